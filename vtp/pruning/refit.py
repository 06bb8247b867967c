"""What is left of a cut model learns in closed form to do what the dense model did: no labels, no training.

Block by block, each linear layer is fitted by damped least squares on images: from what the *cut* model puts
into it, as cut and fitted so far, to what the *dense* model has there. Second moments of the dense model
alone could not do this, as the inputs of a layer change once what is before it is cut. Targets are

    qkv, fc1    the dense layer's outputs, by way of its inputs
    proj, fc2   what the residual stream of the cut model lacks: x_dense - x_cut behind the branch. So each
                branch also mends what those before it left

Where a plan narrows queries and keys or turns values, the fitted rows of qkv are projected to the directions
of `moments.narrowed_scores` and `moments.turned_values`, both from the dense model's own queries, keys and
outputs. In the last block of a model that reads nothing but its first tokens, only those are fitted.

Cf. Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022, and the closed-form repairs of OB2C,
arXiv 2608.17657, and CORP, arXiv 2602.05243.
"""

import json
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn

from vtp.group import Group, refuse_different, sum_over, take_from_first, together
from vtp.model.widths import SITES
from vtp.pruning.dense_block import (
    attend,
    centred,
    fast_layers,
    hidden_rows,
    into_fc2,
    layer_scales,
    linear,
    read_tokens,
    scaled,
    scaled_weight,
    split_heads,
)
from vtp.pruning.moments import Moments, finite, narrowed_scores, ridge, turned_values
from vtp.pruning.plan import PruningPlan
from vtp.pruning.streams import Progress, Store, Stream, embedded

# Rows that moments are taken from, spread over all images: so many for each input of the widest layer, and
# this many at least. Images count, as the tokens of one are alike; more rows take time and add little.
ROWS_PER_INPUT, LEAST_ROWS = 10, 32_768
# Two thousand are enough (docs/one-shot.md), and all that are read are kept: these take a DeiT-B 20 GB.
MOST_IMAGES = 16_384


@torch.no_grad()
def refit(
    plain: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    images: Tensor | Iterable,
    *,
    memory_gb: float | None = None,
    progress: Progress | None = None,
    damping: float | None = None,
    feedback: bool = True,
    rows: int | None = None,
    group: Group = None,
) -> None:
    """Set the weights of a cut model's blocks, in place. A LayerScale becomes a part of them, and 1.

    Args:
        plain: the dense model, from `streams.plain_copy`.
        small: the model cut to the plan, of the same dtype, in eval mode.
        plan: what it was cut to.
        images: as `vtp.calibrate` takes them; the first `MOST_IMAGES` are read.
        memory_gb: for both models' streams, in units of 1e9 bytes; the rest lies in a temporary file.
        progress: called with what is going on and the share that is done.
        damping: as `moments.ridge` takes it.
        feedback: False takes the dense branch's own outputs as the targets of proj and fc2.
        rows: that moments are taken from, at least, of all that there are; None for `ROWS_PER_INPUT` for each
            input of the widest layer, and no fewer than `LEAST_ROWS`.
        group: as `vtp.calibrate` takes it. Each process runs its images; sums are over all of them, and what
            is solved from these on the first process goes to all.

    Raises:
        ImagesError, RankError: as `vtp.calibrate` does.
        ValueError: activations are not finite; or the processes have different models or plans.
    """
    if group is not None:
        refuse_different(group, "plan", json.dumps(plan.to_dict()))
    store = Store(memory_gb, plain.patch_embed.proj.weight.device)
    try:
        stream = embedded(plain, images, store, progress, most=MOST_IMAGES, group=group)
        with together(group):  # a disk may be full
            cut = [store.keep(piece.clone()) for piece in stream.pieces]
        rows = rows or max(ROWS_PER_INPUT * max(plan.widths.values()), LEAST_ROWS)
        with fast_layers(plain, small):
            for i, (block, own) in enumerate(zip(plain.blocks, small.blocks, strict=True)):
                if progress is not None:
                    progress(f"block {i + 1} of {len(plain.blocks)}", i / len(plain.blocks))
                read = read_tokens(plan.architecture) if i == len(plain.blocks) - 1 else None
                fit = _BlockFit(plan, i, block, own, stream, cut, read, rows, damping, feedback)
                fit.attention(store)
                fit.mlp()
    finally:
        store.close()


class _BlockFit:
    """The fit of one block, over both residual streams, whose pieces go on to what the block puts out.

    Args:
        plan, index: what is kept, and of which block.
        block, own: it in the dense and in the cut model.
        stream, cut: of the dense model, and the pieces of that of the cut one.
        read: tokens of an image, from the first on, that what the block puts out is fitted on; None for all.
        rows: as `refit` takes it, but not None.
        damping, feedback: as `refit` takes them.
    """

    def __init__(
        self,
        plan: PruningPlan,
        index: int,
        block: nn.Module,
        own: nn.Module,
        stream: Stream,
        cut: list[Tensor],
        read: int | None,
        rows: int,
        damping: float | None,
        feedback: bool,
    ) -> None:
        self.block, self.own, self.dense, self.cut, self.read = block, own, stream.pieces, cut, read
        self.rope, self.gammas, self.group = stream.ropes[index], layer_scales(block), stream.group
        self.damping, self.feedback = damping, feedback
        self.device = block.attn.qkv.weight.device
        self.taken = self._rows_taken(stream, every=max(1, stream.images * stream.tokens // rows))
        self.kept = {
            site: torch.tensor(plan.kept[f"blocks.{index}.{site}"], dtype=torch.int64, device=self.device)
            for site in SITES
        }
        self.keys, self.values = plan.key_widths(index), plan.value_widths(index)
        self.turned, self.architecture = plan.value_basis == "principal", plan.architecture
        self.before: list[Tensor] = []  # without feedback: what the cut stream lacked before the branch

    def attention(self, store: Store) -> None:
        """Fit qkv and proj."""
        attn, own = self.block.attn, self.own.attn
        alive = hasattr(own, "qkv")
        d, heads = attn.head_dim, range(attn.num_heads)
        inputs = self.kept["attn.qkv"]
        kept_first = _kept_first(inputs, self.architecture.embed_dim)
        weight, bias = scaled_weight(attn.qkv)
        sums = Moments(len(inputs), len(kept_first), self.device)
        queries, keys, outs = ([Moments(d, device=self.device) for _ in heads] for _ in range(3))
        narrow = any(0 < width < d for width in self.keys)
        self._begin_branch()
        for piece, (x, rest) in enumerate(self._pieces()):
            normed = self.block.norm1(x)
            query, key, value = split_heads(attn, attn.qkv(normed), self.rope)
            heads_out = attend(attn, query, key, value)
            if alive:
                given = self.own.norm1(self._thinned(rest, piece))
                sums.add(given, _missing(self._thinned(normed, piece), given, kept_first))
                if narrow:
                    self._add_heads(queries, query.transpose(1, 2), piece)
                    self._add_heads(keys, centred(key).transpose(1, 2), piece)
                if self.turned:
                    self._add_heads(outs, heads_out.unflatten(-1, (attn.num_heads, d)), piece)
            x += scaled(attn.proj(heads_out), self.gammas[0])
        proj, proj_bias = scaled_weight(attn.proj, self.gammas[0])
        if not alive:
            own.bias.copy_(self._mean_lack())
            for _, rest in self._pieces():
                rest += own.bias
            return
        for moments in (sums, *(outs if self.turned else ()), *((*queries, *keys) if narrow else ())):
            moments.sum_over(self.group)
        change, shift = ridge(sums, self.damping, attn.qkv.bias is not None)
        behind = weight[:, kept_first]
        weight, bias = weight[:, inputs] + behind @ change, bias + behind @ shift
        rows, columns = [], []
        for head in heads:
            part = slice(head * d, (head + 1) * d)
            # The softmax does not see the mean of keys, which may be large beside how they vary.
            if self.keys[head] < d:
                own_keys = slice((attn.num_heads + head) * d, (attn.num_heads + head + 1) * d)
                bias[own_keys] = -weight[own_keys] @ sums.mean
            if self.keys[head]:
                to_query, to_key = self._scores_kept(queries[head], keys[head], self.keys[head])
                turn, back = self._values_kept(outs[head], proj[:, part], head)
                rows.append((to_query, to_key, turn))
                columns.append(proj[:, part] @ back)
        parts = [t.unflatten(0, (3, attn.num_heads, d)) for t in (weight, bias)]
        alive_heads = [head for head in heads if self.keys[head]]
        for target, of in zip((own.qkv.weight, own.qkv.bias), parts, strict=True):
            if target is not None:
                turned = [
                    turns[kind].T @ of[kind, head]
                    for kind in range(3)
                    for head, turns in zip(alive_heads, rows, strict=True)
                ]
                target.copy_(torch.cat(turned))
        take_from_first(self.group, own.qkv.weight, own.qkv.bias)
        prior = torch.cat(columns, dim=1)
        sums = Moments(prior.shape[1], len(prior), self.device)
        with store.for_a_while() as short:
            entered = []
            for piece, (x, rest) in enumerate(self._pieces()):
                out = own.attend(own.qkv(self.own.norm1(rest)), None, False, self.rope, on_kernels=False)
                given = own.norm(out)
                entered.append(short.keep(given))
                lack = self._counted_lack(piece, x, rest)
                counted = self._counted(given, piece)
                sums.add(counted, lack - _linear(counted, prior, proj_bias))
            self._set(own.proj, self.own.ls1, prior, proj_bias, sums)
            for given, (_, rest) in zip(entered, self._pieces(), strict=True):
                rest += self.own.ls1(own.proj(given.to(rest)))

    def mlp(self) -> None:
        """Fit fc1 and fc2."""
        mlp, own = self.block.mlp, self.own.mlp
        alive = hasattr(own, "fc1")
        inputs, hidden = self.kept["mlp.fc1"], self.kept["mlp.fc2"]
        made = hidden_rows(hidden, self.architecture)
        kept_first = _kept_first(inputs, self.architecture.embed_dim)
        sums = Moments(len(inputs), len(kept_first), self.device)
        if self.read is not None:  # nothing else is wanted from here on
            self.dense, self.cut = ([piece[:, : self.read] for piece in s] for s in (self.dense, self.cut))
            self.taken = None
        self._begin_branch()
        for piece, (x, rest) in enumerate(self._pieces()):
            normed = self.block.norm2(x)
            if alive:
                given = self.own.norm2(self._counted(rest, piece))
                sums.add(given, _missing(self._counted(normed, piece), given, kept_first))
            x += scaled(mlp.fc2(into_fc2(mlp, mlp.fc1(normed))), self.gammas[1])
        if not alive:
            own.bias.copy_(self._mean_lack())
            for _, rest in self._pieces():
                rest += own.bias
            return
        weight, bias = (part[made] for part in scaled_weight(mlp.fc1))
        self._set(own.fc1, nn.Identity(), weight[:, inputs], bias, sums, behind=weight[:, kept_first])
        weight, bias = scaled_weight(mlp.fc2, self.gammas[1])
        weight = weight[:, hidden]
        sums = Moments(len(hidden), len(weight), self.device)
        for piece, (x, rest) in enumerate(self._pieces()):
            lack = self._counted_lack(piece, x, rest)
            given = into_fc2(own, own.fc1(self.own.norm2(self._counted(rest, piece))))
            sums.add(given, lack - _linear(given, weight, bias))
        self._set(own.fc2, self.own.ls2, weight, bias, sums)
        for _, rest in self._pieces():
            rest += self.own.ls2(own.fc2(into_fc2(own, own.fc1(self.own.norm2(rest)))))

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of both streams on the model's device; what is written to them is kept."""
        for pair in zip(self.dense, self.cut, strict=True):
            moved = tuple(piece.to(self.device) for piece in pair)
            yield moved
            for piece, new in zip(pair, moved, strict=True):
                if new is not piece:
                    piece.copy_(new)

    def _rows_taken(self, stream: Stream, every: int) -> list[Tensor] | None:
        """Of each piece which rows are taken, one of so many: other tokens of each image, by its number among
        the images of all processes, so that all together take the same as one would. None for all rows."""
        if every == 1:
            return None
        token = torch.arange(stream.tokens)
        numbers = stream.numbers()
        return [
            ((n[:, None] + token).flatten() % every == 0).nonzero()[:, 0].to(self.device) for n in numbers
        ]

    def _thinned(self, x: Tensor, piece: int) -> Tensor:
        """Some of the rows [n, ...] of x [images, tokens, ...]; other tokens of each image."""
        return x.flatten(0, 1) if self.taken is None else x.flatten(0, 1)[self.taken[piece]]

    def _add_heads(self, sums: list[Moments], x: Tensor, piece: int) -> None:
        """Take some rows of x [images, tokens, heads, d] into the moments of each head."""
        for moments, rows in zip(sums, self._thinned(x, piece).unbind(1), strict=True):
            moments.add(rows)

    def _counted(self, x: Tensor, piece: int) -> Tensor:
        """Rows of tokens that what the block puts out is fitted on: some of all, or all of those read."""
        return self._thinned(x, piece) if self.read is None else x[:, : self.read].flatten(0, 1)

    def _begin_branch(self) -> None:
        if not self.feedback:
            self.before = [x - rest for x, rest in self._pieces()]

    def _counted_lack(self, piece: int, x: Tensor, rest: Tensor) -> Tensor:
        """The rows of `_lack` that count."""
        lack = self._counted(x, piece) - self._counted(rest, piece)
        return lack if self.feedback else lack - self._counted(self.before[piece], piece)

    def _lack(self, piece: int, x: Tensor, rest: Tensor) -> Tensor:
        """What a branch of the cut model should put out, from the streams behind and before it."""
        return x - rest if self.feedback else x - rest - self.before[piece]

    def _mean_lack(self) -> Tensor:
        width = self.dense[0].shape[-1]
        total = torch.zeros(width + 1, dtype=torch.float64, device=self.device)  # the last counts
        for piece, (x, rest) in enumerate(self._pieces()):
            lack = self._lack(piece, x, rest)[:, : self.read].flatten(0, 1).double()
            total += F.pad(lack.sum(0), (0, 1), value=len(lack))
        sum_over(self.group, total)
        return finite(total[:-1] / total[-1])

    def _scores_kept(self, queries: Moments, keys: Moments, width: int) -> tuple[Tensor, Tensor]:
        """What queries and keys of one head meet, [d, width] each."""
        d = self.block.attn.head_dim
        if width == d:
            eye = torch.eye(d, dtype=torch.float64, device=self.device)
            return eye, eye
        to_query, to_key, _ = narrowed_scores(queries.raw, keys.raw)
        return to_query[:, :width], to_key[:, :width]

    def _values_kept(self, out: Moments, proj: Tensor, head: int) -> tuple[Tensor, Tensor]:
        """(turn, back) [d, kept] of one head: what values meet, and what the columns of proj meet."""
        d, width = proj.shape[1], self.values[head]
        own = slice(head * d, (head + 1) * d)
        eye = torch.eye(d, dtype=torch.float64, device=self.device)
        if self.turned and width < d:
            turn, back, _ = turned_values(out.covariance, proj)
            return turn[:, :width], back[:, :width]
        kept = self.kept["attn.proj"]
        chosen = kept[(kept >= own.start) & (kept < own.stop)] - own.start
        if self.architecture.scale_attn_norm:
            return eye, eye[:, chosen]
        return eye[:, chosen], eye[:, chosen]

    def _set(
        self,
        layer: nn.Linear,
        scale: nn.Module,
        weight: Tensor,
        bias: Tensor,
        sums: Moments,
        behind: Tensor | None = None,
    ) -> None:
        """The layer that has been missing `sums` of its targets, or what `behind` makes the rest of its
        targets of; its LayerScale becomes 1."""
        sums.sum_over(self.group)
        change, shift = ridge(sums, self.damping, layer.bias is not None)
        if behind is not None:
            change, shift = behind @ change, behind @ shift
        layer.weight.copy_(weight + change)
        if layer.bias is not None:
            layer.bias.copy_(bias + shift)
        take_from_first(self.group, layer.weight, layer.bias)
        if isinstance(scale, LayerScale):
            scale.gamma.fill_(1)


def _kept_first(inputs: Tensor, width: int) -> Tensor:
    """Inputs of a dense layer in an order that begins with those that are kept."""
    removed = torch.ones(width, dtype=torch.bool, device=inputs.device)
    removed[inputs] = False
    return torch.cat([inputs, removed.nonzero()[:, 0]])


def _missing(dense: Tensor, cut: Tensor, kept_first: Tensor) -> Tensor:
    """What rows of a cut layer's inputs [n, kept] lack of the dense one's [n, width], in the order given.

    Times the dense weights it is what the cut layer lacks with those of them that it keeps: few dimensions,
    where the outputs of qkv or fc1 are many.
    """
    missing = dense.index_select(1, kept_first)
    missing[:, : cut.shape[1]] -= cut
    return missing


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(x, weight.to(x), bias.to(x))
