"""The widths of a block: how many inputs each of its linear layers keeps."""

import dataclasses

# The attribute of the block that each gated linear layer is; the order of a block's forward pass.
SITES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclasses.dataclass(frozen=True)
class BlockWidths:
    """Kept widths of one block; a branch with a width of 0 is a constant.

    Attributes:
        qkv, fc1, fc2: kept inputs of these layers.
        values: kept value dimensions of each head, 0 where the head is removed; their sum is the kept inputs
            of proj.
        keys: width of the queries and keys of each head, 0 where the head is removed; () where each head that
            has values has those of the dense model.
    """

    qkv: int = 0
    values: tuple[int, ...] = ()
    fc1: int = 0
    fc2: int = 0
    keys: tuple[int, ...] = ()
