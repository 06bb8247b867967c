"""Inference: a compact model packed once for the fused ops of `vtp_kernels`.

What each linear layer is followed by on its way into the next is folded into its weights, in float32 (biases
in float64), and rounded once: LayerNorm's weight and bias into the linear behind it, LayerScale into the
linear before it, and what a constant branch adds into the bias of the linear that wrote to the residual
stream before. A block is then six or seven launches:

    layer_norm_gather, compact_linear (qkv), ragged_attention, add_linear_ (proj),
    layer_norm_gather, compact_linear (fc1 + GELU), add_linear_ (fc2)

of which the last two are one `compact_mlp` where the residual stream is narrow. With many rows GELU is one
more. Rotary embedding and SwiGLU are epilogues of the products before them, and with many rows a launch each.
On a GPU heads are padded instead for PyTorch's fused attention where that is predicted to be faster.

A product of few rows and 4,096 inputs or more, the hidden units of an uncut ViT-L, adds one: its inputs are
split among programs.

Plain PyTorch operators remain where no op applies: the norms of queries and keys (qk_norm) with the
concatenation behind them, attention under a mask or with heads wider than 256, activations other than the
exact GELU, and everything outside the blocks, which is timm's own. A norm before proj or fc2 is one more
layer_norm_gather; in the place of compact_mlp there are then two compact_linear, and PyTorch's activation.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vtp.machine import return_freed_memory
from vtp.model.architecture import class_name, refuse_changed_behaviour, wrapped_hint
from vtp.model.images import described
from vtp.pruning.compact import CompactBlock, CompactModel, ConstantBranch
from vtp.runtime import cpu
from vtp.runtime.packed import (
    PackedAttention,
    PackedBlock,
    PackedMlp,
    PatchProduct,
    absorb_constants,
    add_in_place,
)
from vtp_kernels.library import autocast_is_on

# Of packed models; float64 is for comparisons. Images may be of the first three whatever the model is.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def optimize(
    model: CompactModel, dtype: torch.dtype | None = None, *, features: bool = False
) -> "OptimizedViT":
    """Pack a compact model for inference on its device. The result shares no memory with it.

    Args:
        model: what `vtp.compact` or `vtp.load` gave.
        dtype: of weights and activations: float32, bfloat16, float16 or float64; None keeps the model's.
        features: whether the result is to have `forward_features`, `forward_head` and `forward_intermediates`
            whatever runs it. Without, the C++ engine runs the model in one call wherever it can; with it, it
            runs the blocks, and what is around them is PyTorch's. Without, too, blocks packed for a GPU write
            what they read, and what a branch adds that was cut to a constant may be moved to an earlier one:
            `forward_intermediates` is then refused.

    Returns:
        The packed model; its `engine` says which of `BACKENDS` runs it, and why no faster one does.

    Raises:
        TypeError: the model is no compact one, a layer of it was replaced, or the dtype is not one of these.
        UnsupportedModelError: it has a replaced method or a forward hook, which the result would not have.
    """
    return _on_first_of(BACKENDS, model, dtype, features)


def pack_for_ops(
    model: CompactModel, dtype: torch.dtype | None = None, *, features: bool = False
) -> "OptimizedViT":
    """Pack a compact model for the ops of `vtp_kernels`, on a CPU too, where they run on plain PyTorch.

    Args, Raises: those of `optimize`.
    """
    return _on_first_of([OPS], model, dtype, features)


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to run packed models.

    Attributes:
        unsupported_reason: called with a packed model and a dtype; why it cannot run that here, None where it
            can.
        pack: called with the same and `optimize`'s features; the module that runs. It may take the packed
            model apart.
        engine: called with the dtype and the reasons of the backends before it; its name, for
            `OptimizedViT.engine`.
    """

    unsupported_reason: Callable[[CompactModel, torch.dtype], str | None]
    pack: Callable[[CompactModel, torch.dtype, bool], nn.Module]
    engine: Callable[[torch.dtype, Sequence[str]], str]


def _for_ops(packed: CompactModel, dtype: torch.dtype, features: bool) -> CompactModel:
    embed = packed.patch_embed
    for block in packed.blocks:
        block.widen(packed.embed_dim, embed.num_patches + packed.num_prefix_tokens)
    if not features and len(packed.blocks):
        add_in_place(packed.blocks)
    if PatchProduct.takes(embed.proj):
        embed.proj = PatchProduct(embed.proj)
    return packed.to(dtype)


def _not_on_gpu(packed: CompactModel, dtype: torch.dtype) -> str | None:
    return "the model is on a CPU" if packed.patch_embed.proj.weight.device.type == "cpu" else None


def _for_cpp(packed: CompactModel, dtype: torch.dtype, features: bool) -> nn.Module:
    return (cpu.pack_blocks if features else cpu.pack)(packed, dtype)


CPP = Backend(
    cpu.unsupported_reason,
    _for_cpp,
    lambda dtype, reasons: f"C++, {torch.ops.vtp.cpu_choice(dtype == torch.bfloat16)}",
)
OPS = Backend(lambda packed, dtype: None, _for_ops, lambda dtype, reasons: "ops of vtp_kernels")
BACKENDS = (
    dataclasses.replace(OPS, unsupported_reason=_not_on_gpu),
    CPP,
    dataclasses.replace(OPS, engine=lambda dtype, reasons: f"plain PyTorch: {reasons[-1]}"),
)


@torch.no_grad()
def _on_first_of(
    backends: Sequence[Backend], model: CompactModel, dtype: torch.dtype | None, features: bool
) -> "OptimizedViT":
    """Pack the model for the first backend that supports it; the last supports every model."""
    dtype, spec = _checked(model, dtype), ImageSpec.of(model)
    packed = packed_model(model, dtype, features=features)
    reasons: list[str] = []
    for backend in backends:
        reason = backend.unsupported_reason(packed, dtype)
        if reason is None:
            break
        reasons.append(reason)
    fast = OptimizedViT(backend.pack(packed, dtype, features), spec, backend.engine(dtype, reasons))
    fast.pretrained_cfg = described(model)
    fast.feature_info = copy.deepcopy(model.feature_info)
    if not features:
        fast.opaque = _opaque(model, fast.vit)
    del packed  # with the copies on the way, twice the size of what is left
    return_freed_memory()
    return fast


def _checked(model: CompactModel, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to pack in; raises TypeError as `optimize` does."""
    if not isinstance(model, CompactModel):
        hint = wrapped_hint(model) or (
            ": cut a gated model with vtp.compact(gated, plan), or read a compact one with vtp.load(file)"
        )
        raise TypeError(f"model: got {type(model).__name__}, expected a compact model{hint}")
    dtype = model.patch_embed.proj.weight.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise TypeError(f"dtype: got {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    refuse_changed_behaviour(model)
    _refuse_changed_blocks(model)
    return dtype


@torch.no_grad()
def packed_model(model: CompactModel, dtype: torch.dtype, *, features: bool = False) -> CompactModel:
    """The model with packed blocks, weights in `dtype`, biases still in float64: what a backend packs.

    features: whether each block is to put out what the model's own does; see `optimize`.
    """
    blocks = nn.Sequential(*[PackedBlock(block, dtype) for block in model.blocks])
    if features:
        for block, packed in zip(model.blocks, blocks, strict=True):
            absorb_constants([block], [packed])
    else:
        absorb_constants(model.blocks, blocks)
    # deepcopy takes what `memo` has for an object: everything but the blocks is copied.
    vit = copy.deepcopy(model, {id(model.blocks): blocks})
    vit.set_grad_checkpointing(False)
    return vit.eval()


def _opaque(model: CompactModel, vit: nn.Module) -> str | None:
    """See `OptimizedViT.opaque`, of a model that was packed without `features`."""
    branches = [part for part in vit.modules() if isinstance(part, PackedAttention | PackedMlp)]
    if any(branch.adds_in_place for branch in branches):
        return "its blocks write what they read, and leave biases to later ones"
    parts = [part for block in model.blocks for part in (block.attn, block.mlp)]
    if any(isinstance(part, ConstantBranch) for part in parts):
        return "what branches add that were cut to constants may lie in earlier blocks"
    return None


def _refuse_changed_blocks(model: CompactModel) -> None:
    """A layer that something else stands for, an adapter or a quantized one, is more than its weight."""
    for i, block in enumerate(model.blocks):
        if type(block) is not CompactBlock:
            raise TypeError(f"model.blocks.{i}: got {type(block).__name__}, expected CompactBlock")
        for owner in (block.attn, block.mlp):
            for name, layer in owner.named_children():
                if name in ("qkv", "proj", "fc1", "fc2") and type(layer) is not nn.Linear:
                    branch, got = "attn" if owner is block.attn else "mlp", class_name(layer)
                    raise TypeError(
                        f"model.blocks.{i}.{branch}.{name}: got {got}, expected torch.nn.Linear; optimize "
                        "the model before it is quantized (dtype=torch.bfloat16 halves it), and once "
                        "adapters are merged"
                    )


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """What images a model takes: `channels`, and (height, width) of an image and of a patch, in pixels."""

    channels: int
    size: tuple[int, int]
    patch_size: tuple[int, int]
    any_size: bool  # that is a multiple of patch_size
    padded: bool  # to such a multiple by the model

    @classmethod
    def of(cls, vit: VisionTransformer | Eva) -> "ImageSpec":
        patch = vit.patch_embed
        return cls(
            patch.proj.in_channels,
            tuple(patch.img_size),
            tuple(patch.patch_size),
            vit.dynamic_img_size,
            patch.dynamic_img_pad,
        )

    def check(self, images: Tensor) -> None:
        """Raise ValueError, which says what was expected, if the shape is not such."""
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected [B, {self.channels}, H, W]")
        size, step = tuple(images.shape[2:]), self.patch_size
        if not self.any_size:
            if size != self.size:
                raise ValueError(f"images: got height and width {size}, expected {self.size}")
        elif not self.padded and (size[0] % step[0] or size[1] % step[1]):
            raise ValueError(f"images: got height and width {size}, expected multiples of {step}")


class OptimizedViT(nn.Module):
    """A compact model packed for inference: images to logits, no gradients, always in eval mode.

    It has timm's `forward_features`, `forward_head` and `forward_intermediates`, and timm's
    `FeatureGetterNet` takes it, if it was packed with `features`; without, where the engine lets it look
    inside, as the C++ engine does not where it runs the model in one call.

    Packed tensors are buffers, in the dtype that it computes in. `torch.compile(fullgraph=True)`,
    `torch.export` with a dynamic batch and AOTInductor take it; what they make needs `vtp_kernels` imported
    where it runs.

    Attributes:
        vit: the compact model that it was made from, with packed blocks; on the CPU's C++ engine a `CpuViT`.
        images: what images it takes.
        engine: what it runs on, in words, with the reason where that is not the fastest there is.
        pretrained_cfg: the model's, for `timm.data.resolve_model_data_config`.
        feature_info: the model's: channels and stride of what each block puts out, for timm's wrappers.
        opaque: why what is between its blocks is not what the model has there, None where it is.
    """

    pretrained_cfg: dict | None = None
    feature_info: list[dict] | None = None
    opaque: str | None = None

    def __init__(self, vit: nn.Module, images: ImageSpec, engine: str) -> None:
        super().__init__()
        self.vit = vit.requires_grad_(False)
        self.images, self.engine = images, engine
        self.train(False)

    def extra_repr(self) -> str:
        return f"engine={self.engine!r}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in, and of its logits."""
        return self._weight.dtype if hasattr(self.vit, "patch_embed") else self.vit.dtype

    @property
    def _weight(self) -> Tensor:
        return self.vit.patch_embed.proj.weight if hasattr(self.vit, "patch_embed") else self.vit.weights

    def train(self, mode: bool = True) -> "OptimizedViT":
        """Stays in eval mode, also as a teacher inside a model that is being trained."""
        return super().train(False)

    def forward(self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Logits of images, in the model's dtype.

        Args:
            images: [B, C, H, W] on the model's device, in any memory format; float32, bfloat16 and float16
                are cast to the model's dtype. Autocast has no say.
            attn_mask, is_causal: of every attention, as timm takes them; not on the C++ engine.

        Raises:
            TypeError: the images are no tensor, or integers, or float64 for another model.
            ValueError: their shape or device is not the model's; a mask on the C++ engine.
        """
        return self._run(self.vit, images, attn_mask, is_causal)

    def forward_features(self, images: Tensor) -> Tensor:
        """What goes into the head, [B, N, embed_dim]: timm's `forward_features`, in the model's dtype.

        Raises:
            ValueError: the C++ engine runs the whole model, as it was packed without `features`; or as
                `forward`.
            TypeError: as `forward`.
        """
        return self._run(self._timms("forward_features"), images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gave, [B, N, embed_dim], to logits, or with `pre_logits` to what goes into
        the last layer. Raises ValueError as `forward_features` does."""
        return self._timms("forward_head")(features, pre_logits)

    def forward_intermediates(self, images: Tensor, *arguments: Any, **keywords: Any) -> Any:
        """timm's `forward_intermediates`: what the blocks put out, with its arguments and results, in the
        model's dtype. The C++ engine then runs each block by itself.

        Raises:
            ValueError: it was packed without `features`, and the C++ engine runs the whole model, or
                `opaque`; or as `forward`.
            TypeError: as `forward`.
        """
        vit = self._block_by_block("forward_intermediates")
        return self._run(vit.forward_intermediates, images, *arguments, **keywords)

    def prune_intermediate_layers(self, *arguments: Any, **keywords: Any) -> list[int]:
        """timm's `prune_intermediate_layers`: drop, in place, blocks, norm and head where nothing asked for
        takes them, with its arguments and result. Raises ValueError as `forward_intermediates` does."""
        self.vit = self._block_by_block("prune_intermediate_layers")
        return self.vit.prune_intermediate_layers(*arguments, **keywords)

    def _run(self, function: Callable[..., Any], images: Tensor, *arguments: Any, **keywords: Any) -> Any:
        """A function of images, checked and in the model's dtype, without autocast."""
        self._validate(images)
        if self._fails_on_none and not torch.compiler.is_compiling() and not len(images):
            of_one = self._run(function, images.new_zeros(1, *images.shape[1:]), *arguments, **keywords)
            return tree_map_only(Tensor, lambda result: result[:0], of_one)
        images = images.detach().to(self.dtype)
        if not autocast_is_on(images.device):
            return function(images, *arguments, **keywords)
        with torch.autocast(images.device.type, enabled=False):
            return function(images, *arguments, **keywords)

    @property
    def _fails_on_none(self) -> bool:
        """Whether timm runs what is before the blocks, and cannot bring 0 images into the shape of tokens."""
        return isinstance(self.vit, Eva) or (self.images.any_size and hasattr(self.vit, "patch_embed"))

    def _timms(self, method: str) -> Callable[..., Any]:
        """A method of timm's, where the engine does not run the model in one piece."""
        if not hasattr(self.vit, "patch_embed"):
            raise self._missing(method, f"the engine {self.engine} runs the model in one piece")
        return getattr(self.vit, method)

    def _block_by_block(self, method: str) -> nn.Module:
        """The model, as timm goes through it, for a method that looks at what is between its blocks."""
        self._timms(method)
        if self.opaque is not None:
            raise self._missing(method, self.opaque)
        return cpu.block_by_block(self.vit)

    @staticmethod
    def _missing(method: str, reason: str) -> ValueError:
        return ValueError(
            f"{method}: {reason}; vtp.optimize(model, features=True) has it, and so has the compact model"
        )

    def _validate(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images: got {type(images).__name__}, expected a tensor")
        if images.dtype not in (*DTYPES[:3], self.dtype):
            expected = "float32, bfloat16 or float16, normalized as for training"
            raise TypeError(f"images: got {images.dtype}, expected {expected}")
        self.images.check(images)
        device = self._weight.device
        if images.device != device:
            raise ValueError(f"images: on {images.device}, expected {device}, where the model is")

    @torch.no_grad()
    def warmup(self, batch_sizes: Sequence[int] = (1,), image_size: tuple[int, int] | None = None) -> None:
        """Compile every kernel and fill every cache, by running on zeros.

        Afterwards nothing is compiled and nothing copied from the host for these sizes: requests are answered
        at once, and `torch.cuda.graph` can capture a call.

        Args:
            batch_sizes: of the requests to come. Kernels depend on it in few coarse steps, if at all.
            image_size: (height, width); None takes the model's own.

        Raises:
            ValueError: a batch size is not an integer from 0, or the model takes no images of that size.
        """
        if isinstance(batch_sizes, int) or not all(type(b) is int and b >= 0 for b in batch_sizes):
            raise ValueError(f"batch_sizes: got {batch_sizes}, expected integers from 0, as in [1, 8]")
        size, device = image_size or self.images.size, self._weight.device
        for batch in batch_sizes:
            self(torch.zeros(batch, self.images.channels, *size, dtype=self.dtype, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
