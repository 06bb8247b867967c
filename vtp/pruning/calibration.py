"""What a minute of images says about a model that needs no training for it: which dimensions, and what they
are worth.

`calibrate` runs the dense model over unlabelled images, a block at a time, and keeps of each linear layer's
inputs how much they vary, how much of the layer's output they carry, and the error curve of removing them one
by one (`moments.obs_curve`); of each head, how much of its scores and of its output is left at each rank. It
then cuts each of these units alone, mends it by its closed form, and measures what becomes of the output of
the whole model: the factor from a layer's error to what it does. With these curves
`make_plan(scope="optimal")` finds the best widths for a budget.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vtp.files import FileError, fingerprint, write_atomic
from vtp.group import Group, first_makes, share, sum_over
from vtp.kinds import STATISTICS, refuse_other_kinds
from vtp.model.architecture import Architecture, describe
from vtp.model.widths import SITES
from vtp.pruning.dense_block import (
    attend,
    centred,
    fast_layers,
    into_fc2,
    layer_scales,
    linear,
    read_tokens,
    scaled,
    scaled_weight,
    split_heads,
)
from vtp.pruning.gates import has_fingerprint
from vtp.pruning.moments import Moments, narrowed_scores, oas_damping, obs_curve, turned_values
from vtp.pruning.streams import Progress, Store, Stream, embedded, plain_copy

STATISTICS_VERSION = 1
# The share of a unit's width to which it is cut alone, to measure what that does to the output; queries and
# keys have most of their scores in few directions. What is removed whole is measured too.
PROBED_SHARE, PROBED_KEY_SHARE = 0.25, 0.125
# Rows that second moments are taken from: so many for each input of the widest layer, and this many at least.
ROWS_PER_INPUT, LEAST_ROWS = 10, 8192
LEAST_PROBED, MOST_PROBED = 8, 64  # images on which changes are measured


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What `calibrate` found out about one model. Saves as safetensors.

    Attributes:
        architecture: of the dense model.
        parent: fingerprint of its weights, gates folded in (SHA-256, hex).
        images: how many images it was calibrated on.
        change_images: on how many of them changes were measured.
        change: what `changes` are: "KL" from the dense model's class probabilities, in nats, mean over
            images; "binary KL", the sum over the classes of that from its yes or no to each, where an image
            may be of several; or "relative error" of its output, where it has not several classes.
        tensors: float64, by `<site>.<what>`:

            blocks.<i>.<site>.variance    [p]     variance of each input
            blocks.<i>.<site>.activation  [p]     |W_j|^2 times that: its share of the output's variance
            blocks.<i>.<site>.order       [p]     inputs as greedy OBS removes them
            blocks.<i>.<site>.errors      [p+1]   mean square error of the output after so many removals
            blocks.<i>.attn.keys          [H, d]  what each rank of a head carries of the scores' mean square;
                                                  not where keys keep their width
            blocks.<i>.attn.values        [H, d]  what each direction of a head carries of proj's variance;
                                                  not where a norm is before proj
            blocks.<i>.<unit>.changes     [k, 2]  width, and the change with this unit alone cut to it; units
                                                  are attn.qkv, attn.keys, mlp.fc1, mlp.fc2, and attn.values
                                                  or, where a norm is before proj, attn.proj

            LayerScale counts as a part of the weights of proj and fc2.
    """

    architecture: Architecture
    parent: str
    images: int
    change_images: int
    change: str
    tensors: Mapping[str, Tensor] = dataclasses.field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write the statistics as one safetensors file, atomically. Raises FileError."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["tensors"]
        fields["architecture"] = dataclasses.asdict(self.architecture)
        text = json.dumps({"statistics_version": STATISTICS_VERSION, **fields})
        header = {"vtp_statistics": text, "vtp_sha256": fingerprint(self.tensors, text)}

        def write(temporary: Path) -> None:
            try:
                save_file(dict(self.tensors), temporary, metadata=header)
            except SafetensorError as error:
                raise FileError(f"path: cannot write {path}: {error}") from error

        write_atomic(path, write)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read what `save` wrote. Raises FileError with the reason."""
        if not Path(path).is_file() and not Path(path).is_dir():  # a pipe, say, would be waited for
            raise FileError(f"path: no file {path}")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            refuse_other_kinds(path, STATISTICS)
            raise FileError(f"path: cannot read {path}, or it is damaged or cut off ({error})") from error
        text = header.get("vtp_statistics")
        if text is None:
            refuse_other_kinds(path, STATISTICS)
        if header.get("vtp_sha256") != fingerprint(tensors, text):
            raise FileError(f"path: {path} was changed after it was written (its SHA-256 does not match)")
        fields: dict[str, Any] = json.loads(text)
        if fields.pop("statistics_version") != STATISTICS_VERSION:
            raise FileError(f"path: {path} is of another version of vtp; calibrate again")
        fields["architecture"] = Architecture.from_dict(fields["architecture"])
        return cls(**fields, tensors=tensors)

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError if these are not the statistics of this dense or gated model."""
        if not has_fingerprint(plain_copy(model), self.parent):
            raise ValueError(
                "statistics: they are of other weights than the model has; "
                "call vtp.calibrate(model, images) again"
            )


@torch.no_grad()
def calibrate(
    model: nn.Module,
    images: Tensor | Iterable,
    *,
    multi_label: bool = False,
    memory_gb: float | None = None,
    progress: Progress | None = None,
    group: Group = None,
) -> Statistics:
    """Run a dense or gated model over images, without labels, and keep what a cut must know.

    Args:
        model: a supported timm VisionTransformer, or one from `insert_gates`, whose gates count as a part of
            its weights. It is not changed.
        images: normalised, [M, C, H, W]; or an iterable of such batches or of (batch, labels), as a loader
            is, which is read once. Of the training set, and as they are evaluated: not augmented. A thousand
            or two; some ten rows (images times tokens) for each hidden dimension are looked at, and images
            beyond that are not read: a loader may be endless.
        multi_label: whether an image may be of several classes, or of none: the model's outputs are then a
            question each, whose probability is a sigmoid, and not one question for all.
        memory_gb: what the images' tokens may take, in units of 1e9 bytes; the rest goes to a temporary file.
            Beside them there are the second moments of one block, 0.1 GB for a DeiT-B.
        progress: called with what is going on and the share that is done.
        group: processes that share the work, torch.distributed.group.WORLD say: all of them call this, each
            with a share of the images of its own (dealt in turn, image i to rank i mod size, they are those
            that one process would read) and memory of its own. Sums and changes are over all images; all
            get the same statistics, bit for bit, which are those of one process to rounding. None: this
            process alone, whatever others do.

    Returns:
        Statistics, for `make_plan` and `pareto`.

    Raises:
        UnsupportedModelError: as `insert_gates` does.
        ImagesError: images of another shape or kind than the model's, or none, or not finite.
        ValueError: the model's own activations or outputs are not finite; or the processes have different
            models.
        RankError: another process of the group met an error.
    """
    architecture = describe(model)
    plain = plain_copy(model)
    parent = fingerprint(plain.state_dict())
    say = progress or (lambda text, share: None)
    device = plain.patch_embed.proj.weight.device
    store = Store(memory_gb, device)
    try:
        needed = _images_needed(architecture)
        stream = embedded(plain, images, store, progress, most=needed, group=group)
        tensors: dict[str, Tensor] = {}
        with fast_layers(plain):
            last = _Block.of(plain.blocks[-1], stream.ropes[-1], read_tokens(architecture))
            probe = _Probe(plain, stream, last, multi_label)
            for i, block in enumerate(plain.blocks):
                say(f"block {i + 1} of {architecture.depth}", i / architecture.depth)
                before = stream.first(probe.images).to(device)
                dense = last if block is last.block else _Block.of(block, stream.ropes[i])
                narrows = not architecture.whole_keys
                sums = _gather(dense, stream, device, narrows)
                for key, value in _block_tensors(dense, sums, before, narrows, partial(probe.change, i)):
                    tensors[f"blocks.{i}.{key}"] = value.cpu().contiguous()
        made = Statistics(architecture, parent, stream.images, probe.everyones, probe.unit, tensors)
        # The sums were the same everywhere; what was solved from them, on other hardware, need not be.
        return first_makes(group, lambda: made)
    finally:
        store.close()


def _images_needed(architecture: Architecture) -> int:
    """As many as have the rows that are looked at."""
    widest = max(architecture.embed_dim, architecture.mlp_hidden)
    return -(-max(ROWS_PER_INPUT * widest, LEAST_ROWS) // architecture.num_tokens)


@dataclasses.dataclass
class _Block:
    """One block of the dense model as weights and products, of which one at a time is replaced.

    rope: what rotates its queries and keys; None for none.
    read: how many tokens of an image, from the first on, are computed; None for all.
    mixes: [H, d, d], which queries meet on their way to the keys; None for none.
    """

    block: nn.Module
    rope: Tensor | None
    read: int | None
    qkv: tuple[Tensor, Tensor]
    proj: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]
    mixes: Tensor | None = None

    @classmethod
    def of(cls, block: nn.Module, rope: Tensor | None, read: int | None = None) -> "_Block":
        """As it is."""
        gammas = layer_scales(block)
        return cls(
            block,
            rope,
            read,
            scaled_weight(block.attn.qkv),
            scaled_weight(block.attn.proj, gammas[0]),
            scaled_weight(block.mlp.fc1),
            scaled_weight(block.mlp.fc2, gammas[1]),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [images, tokens, embed_dim] to the same shape, or to [images, read, embed_dim]."""
        attn, mlp = self.block.attn, self.block.mlp
        query, key, value = split_heads(attn, self._linear(self.block.norm1(x), self.qkv), self.rope)
        if self.mixes is not None:
            query = query @ self.mixes.to(query)
        query, x = query[:, :, : self.read], x[:, : self.read]
        x = x + self._linear(attend(attn, query, key, value), self.proj)
        return x + self._linear(into_fc2(mlp, self._linear(self.block.norm2(x), self.fc1)), self.fc2)

    @staticmethod
    def _linear(x: Tensor, layer: tuple[Tensor, Tensor]) -> Tensor:
        weight, bias = layer
        return linear(x, weight.to(x), bias.to(x))


@dataclasses.dataclass
class _Sums:
    """Second moments of what goes through one block: inputs of its sites; queries and keys of each head where
    a cut may narrow them."""

    sites: dict[str, Moments]
    queries: list[Moments]
    keys: list[Moments]


def _gather(dense: _Block, stream: Stream, device: torch.device, narrows: bool) -> _Sums:
    """The sums of a block over the stream, which goes on to what the block puts out."""
    block = dense.block
    attn, mlp, gammas = block.attn, block.mlp, layer_scales(block)
    narrowed = range(attn.num_heads if narrows else 0)
    sums = _Sums(
        {site: Moments(block.get_submodule(site).in_features, device=device) for site in SITES},
        *([Moments(attn.head_dim, device=device) for _ in narrowed] for _ in range(2)),
    )
    for piece in stream.pieces:
        x = piece.to(device)
        normed = block.norm1(x)
        sums.sites["attn.qkv"].add(normed.flatten(0, 1))
        query, key, value = split_heads(attn, attn.qkv(normed), dense.rope)
        varying = centred(key) if narrows else key
        for head in narrowed:
            sums.queries[head].add(query[:, head].flatten(0, 1))
            sums.keys[head].add(varying[:, head].flatten(0, 1))
        out = attend(attn, query, key, value)
        sums.sites["attn.proj"].add(out.flatten(0, 1))
        x = x + scaled(attn.proj(out), gammas[0])
        normed = block.norm2(x)
        sums.sites["mlp.fc1"].add(normed.flatten(0, 1))
        hidden = into_fc2(mlp, mlp.fc1(normed))
        sums.sites["mlp.fc2"].add(hidden.flatten(0, 1))
        piece.copy_(x + scaled(mlp.fc2(hidden), gammas[1]))
    for moments in (*sums.sites.values(), *sums.queries, *sums.keys):
        moments.sum_over(stream.group)
    return sums


class _Probe:
    """What becomes of the output of the whole model when one block puts out something else.

    Attributes:
        images: so many images it is measured on here; everyones: on all processes together.
        unit: of the change, as in `Statistics`.

    Args:
        plain, stream: the dense model, and what goes into its first block.
        last: its last block, with the tokens alone that its output depends on.
        multi_label: as `calibrate` takes it.
    """

    def __init__(self, plain: nn.Module, stream: Stream, last: _Block, multi_label: bool) -> None:
        depth = len(plain.blocks)
        # Each block is cut alone seven times and half of the model runs after it: as much as two passes
        # over the images that moments are taken from.
        images = min(max(LEAST_PROBED, int(2 * stream.images / (3.5 * depth))), MOST_PROBED)
        self.images = min(share(images, stream.group), sum(map(len, stream.pieces)))
        self._model, self._ropes, self._group, self._last = plain, stream.ropes, stream.group, last
        self.unit = "KL" if plain.num_classes > 1 else "relative error"
        if multi_label and plain.num_classes:
            self.unit = "binary KL"
        device = plain.patch_embed.proj.weight.device
        self._dense = dense = self._output(0, stream.first(self.images).to(device)).double()
        self.everyones = int(self._total(torch.tensor(float(len(dense)), dtype=torch.float64, device=device)))
        mean = self._total(dense.sum(0)) / self.everyones
        if not mean.isfinite().all():
            raise ValueError("model: got outputs that are NaN or infinite on these images, expected finite")
        # Images that are all the same, one say, leave nothing but how large the output is.
        spread, size = (self._mean_square(values) for values in (dense - mean, dense))
        self._scale = max(spread, 1e-12 * size) or 1.0

    def change(self, block: int, x: Tensor) -> float:
        """How far the output is from the dense model's with x behind this block."""
        got, dense = self._output(block + 1, x).double(), self._dense
        if self.unit in ("KL", "binary KL"):
            dense, got = (self._log_probabilities(logits) for logits in (dense, got))
            change = self._total((dense.exp() * (dense - got)).sum()).item() / self.everyones
        else:
            change = self._mean_square(got - dense) / self._scale
        if not math.isfinite(change):
            raise ValueError(
                f"model: got NaN or infinite outputs with a part of block {block} cut, expected finite ones"
            )
        return max(change, 0.0)

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        """Of all answers to the one question, or of yes and no to one for each class."""
        if self.unit == "KL":
            return logits.log_softmax(-1)
        return torch.cat([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=-1)

    def _total(self, own: Tensor) -> Tensor:
        """The sum of what all processes have."""
        sum_over(self._group, own)
        return own

    def _mean_square(self, values: Tensor) -> float:
        """Mean square of values [images, ...] over the images of all processes."""
        return self._total(values.square().sum()).item() / (self.everyones * values.shape[1:].numel())

    def _output(self, block: int, x: Tensor) -> Tensor:
        for later, rope in zip(self._model.blocks[block:-1], self._ropes[block:-1], strict=True):
            x = later(x) if rope is None else later(x, rope=rope)
        if block < len(self._model.blocks):
            x = self._last(x)
        return self._model.forward_head(self._model.norm(x))


def _block_tensors(
    dense: _Block, sums: _Sums, before: Tensor, narrows: bool, change: Callable[[Tensor], float]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `Statistics` for one block, by their names in it.

    Args:
        dense: the block; sums: its moments.
        before: what goes into the block, for the images on which changes are measured.
        narrows: whether a cut may narrow queries and keys.
        change: the change of the model's output for what the block puts out instead.
    """

    def measured(**cut: Any) -> float:
        return change(dataclasses.replace(dense, **cut)(before))

    attn = dense.block.attn
    turns = isinstance(attn.norm, nn.Identity)  # else the norm before proj is over values as they are
    constants = {}
    for branch, last in (("attn", "proj"), ("mlp", "fc2")):
        weight, bias = getattr(dense, last)
        mean = weight @ sums.sites[f"{branch}.{last}"].mean + bias
        constants[branch] = measured(**{last: (torch.zeros_like(weight), mean)})

    for site, moments in sums.sites.items():
        branch, layer = site.split(".")
        weight, bias = getattr(dense, layer)
        covariance = moments.covariance
        variance = covariance.diagonal()
        order, errors = obs_curve(covariance, weight, moments.count)
        yield f"{site}.variance", variance
        yield f"{site}.activation", weight.square().sum(0) * variance
        yield f"{site}.order", order.double()
        yield f"{site}.errors", errors
        if layer != "proj" or not turns:
            kept = max(1, round(PROBED_SHARE * len(order)))
            mended = _without(moments, weight, bias, order[len(order) - kept :].to(weight.device))
            yield f"{site}.changes", _points((0, constants[branch]), (kept, measured(**{layer: mended})))

    H, d = attn.num_heads, attn.head_dim
    if turns:
        proj, bias = dense.proj
        out = sums.sites["attn.proj"]
        covariance = out.covariance
        kept = max(1, round(PROBED_SHARE * d))
        energies, projection = [], torch.zeros(H * d, H * d, dtype=torch.float64, device=proj.device)
        for own in (slice(head * d, (head + 1) * d) for head in range(H)):
            turn, back, energy = turned_values(covariance[own, own], proj[:, own])
            energies.append(energy)
            projection[own, own] = back[:, :kept] @ turn[:, :kept].T
        yield "attn.values", torch.stack(energies)
        cut = proj @ projection
        change_of_values = measured(proj=(cut, bias + (proj - cut) @ out.mean))
        yield "attn.values.changes", _points((0, constants["attn"]), (H * kept, change_of_values))

    if narrows:
        kept = max(1, round(PROBED_KEY_SHARE * d))
        energies, mixes = [], []
        for queries, keys in zip(sums.queries, sums.keys, strict=True):
            to_query, to_key, energy = narrowed_scores(queries.raw, keys.raw)
            energies.append(energy)
            mixes.append(to_query[:, :kept] @ to_key[:, :kept].T)
        yield "attn.keys", torch.stack(energies)
        yield "attn.keys.changes", _points((H * kept, measured(mixes=torch.stack(mixes))))


def _points(*points: tuple[int, float]) -> Tensor:
    return torch.tensor(points, dtype=torch.float64)


def _without(moments: Moments, weight: Tensor, bias: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """A layer that reads `kept` inputs only and makes up for the others by what it knows of them."""
    covariance = moments.covariance
    own = covariance[kept][:, kept]
    damping = oas_damping(own, moments.count)
    own = own + max(damping, torch.finfo(torch.float32).tiny) * torch.eye(len(own)).to(own)
    cut = torch.zeros_like(weight)
    cut[:, kept] = torch.linalg.solve(own, covariance[kept] @ weight.T).T
    return cut, bias + (weight - cut) @ moments.mean
