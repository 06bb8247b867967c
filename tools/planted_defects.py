"""Plant defects, one at a time, in a copy of the tree, and see which test of `make test` catches each.

    python -m tools.planted_defects                    all of them, about ten minutes
    python -m tools.planted_defects training csrc      those of files whose path has one of these texts in it

Each row is a mistake that somebody might make: the file, the text that is there, what stands there instead,
what is then wrong, and the tests that are run, of the quick lane alone. Kernels have defects of their own, in
`tests/vtp_kernels`, planted whenever the tests run.

Exit status: 0 where all are caught; 1 where one is not; 2 where a text is in no path, or where tests that may
see a defect were skipped for want of the C++ operators (`python setup.py build_ext --inplace` builds them).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm  # noqa: F401 what takes longest to import
import torch  # noqa: F401
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
LIBRARY = Path("vtp_kernels", "_cpu.abi3.so")  # the C++ operators, where they are built


@dataclass(frozen=True)
class Defect:
    """`old`, which is in `file` once, becomes `new`; `wrong` says what of it; `tests` may see it.

    build: whether the C++ operators have to be built for it.
    """

    file: str
    old: str
    new: str
    wrong: str
    tests: str
    build: bool = False


DEFECTS = [
    # -- vtp/model, vtp/pruning
    Defect(
        "vtp/model/cost.py",
        "macs += tokens * tokens * (keys + made)",
        "macs += 2 * tokens * tokens * keys",
        "attention counts dense value widths",
        "tests/vtp/model",
    ),
    Defect(
        "vtp/model/cost.py",
        "outputs = (architecture.mlp_hidden if normed else hidden) * (2 if architecture.glu else 1)",
        "outputs = hidden * (2 if architecture.glu else 1)",
        "a removed input of fc2 takes its rows of fc1 with it, whatever norm reads them",
        "tests/vtp/model/test_cost.py -k norm",
    ),
    Defect(
        "vtp/pruning/removed.py",
        "return zero if isinstance(norm, nn.Identity) else _zero_norm(norm)",
        "return zero",
        "what was removed behind a norm before proj or fc2 is not found again",
        "tests/vtp/pruning/test_expand.py",
    ),
    Defect(
        "vtp/pruning/refit.py",
        "            return eye, eye[:, chosen]\n        return",
        "            pass\n        return",
        "the refit cuts values that the norm before proj is over",
        "tests/vtp/pruning/test_refit.py -k inner",
    ),
    Defect(
        "vtp/pruning/moments.py",
        "norms -= 2 * c[step] * d[step]",
        "pass",
        "greedy OBS does not make up for what it removes",
        "tests/vtp/pruning/test_moments.py -k obs",
    ),
    Defect(
        "vtp/pruning/moments.py",
        "(x - self._shift, None if e is None else e.clone())",
        "(x, e)",
        "rows that wait change with what they are a view of, and their mean is not taken off",
        "tests/vtp/pruning/test_moments.py",
    ),
    Defect(
        "vtp/pruning/moments.py",
        "self._xe += torch.outer(moved, self._e)",
        "pass",
        "sums over ranks forget that each has taken off a mean of its own",
        "tests/vtp/test_many_processes.py -k refit",
    ),
    Defect(
        "vtp/pruning/streams.py",
        "yield rank + ranks * torch.arange(before, before + len(piece))",
        "yield torch.arange(before, before + len(piece))",
        "each rank thins its rows as if it had all images",
        "tests/vtp/test_many_processes.py -k refit",
    ),
    Defect(
        "vtp/pruning/dense_block.py",
        "return key - key.mean(-2, keepdim=True)",
        "return key",
        "what is equal for all keys counts as a part of their scores",
        "tests/vtp/pruning/test_calibration.py -k narrow_keys",
    ),
    Defect(
        "vtp/pruning/allocation.py",
        "best[: size - steps] + way.change",
        "way.change",
        "a branch forgets those before it",
        "tests/vtp/pruning/test_allocation.py -k combinations",
    ),
    Defect(
        "vtp/pruning/refit.py",
        "weight, bias = weight + change, bias + shift",
        "weight, bias = weight + change, bias",
        "the refit of qkv leaves its bias",
        "tests/vtp/pruning/test_refit.py -k mean_of",
    ),
    Defect(
        "vtp/pruning/gates.py",
        "(self.gate * self.gate.grad * scale).square()",
        "(self.gate.grad * scale).square()",
        "the Taylor score leaves the gate out",
        "tests/vtp/pruning/test_gates.py",
    ),
    Defect(
        "vtp/pruning/plan.py",
        "np.bincount(heads, minlength=self.architecture.num_heads)",
        "np.bincount(heads)",
        "a last head that is gone is forgotten",
        "tests/vtp/pruning/test_plan.py -k value_widths",
    ),
    Defect(
        "vtp/pruning/scores.py",
        "(np.cumsum(counts) - counts / 2)",
        "np.cumsum(counts)",
        "ties get the highest rank of theirs instead of the mean",
        "tests/vtp/pruning",
    ),
    Defect(
        "vtp/pruning/selection.py",
        "math.ceil(min_keep * width)",
        "math.floor(min_keep * width)",
        "min_keep protects one dimension too few",
        "tests/vtp/pruning/test_plan.py -k min_keep",
    ),
    Defect(
        "vtp/pruning/selection.py",
        "            exhausted.add(slot)\n",
        "",
        "a vector gives back worse groups before better ones",
        "tests/vtp/pruning/test_plan.py",
    ),
    Defect(
        "vtp/pruning/selection.py",
        "            floor = width\n",
        "            pass\n",
        "a protected part is cut",
        "tests/vtp/pruning/test_protect.py",
    ),
    Defect(
        "vtp/pruning/selection.py",
        "protected &= ~absent[name]",
        "pass",
        "min_keep brings back what an earlier cut removed",
        "tests/vtp/pruning/test_expand.py -k min_keep",
    ),
    Defect(
        "vtp/pruning/expand.py",
        """"attn.k_norm.weight", "ls1.gamma", "gamma_1"):
            if name in into:
                into[name].fill_(1)""",
        """"attn.k_norm.weight", "ls1.gamma", "gamma_1"):
            if name in into:
                into[name].fill_(0)""",
        "the constant of a removed branch is lost on the way back",
        "tests/vtp/pruning/test_expand.py -k constants",
    ),
    Defect(
        "vtp/pruning/compact.py",
        "if self.fused_attn and len(set(self.value_widths)) == 1",
        "if len(set(self.value_widths)) == 1",
        "attention weights do not pass attn_drop where heads are equal",
        "tests/vtp/pruning/test_compact_tools.py -k maps",
    ),
    Defect(
        "vtp/model/architecture.py",
        "    refuse_changed_behaviour(model)\n    _refuse_other_parts(model)",
        "    _refuse_other_parts(model)",
        "hooks and replaced methods are forgotten",
        "tests/vtp/model/test_architecture.py",
    ),
    Defect(
        "vtp/weights.py",
        "use_ema=True, weights_only=True",
        "use_ema=True, weights_only=False",
        "the pickle of a checkpoint is executed",
        "tests/vtp/test_zoo.py -k executed",
    ),
    Defect(
        "vtp/pruning/dense_block.py",
        "torch.cat([hidden, architecture.mlp_hidden + hidden])",
        "torch.cat([hidden, hidden])",
        "a cut SwiGLU multiplies the gate with itself",
        "tests/vtp/model/test_eva.py -k exact_in_every_form",
    ),
    Defect(
        "vtp/pruning/compact.py",
        "torch.stack([rope[..., head, :, :] for head in self.kept_heads], dim=-3)",
        "rope[..., : self.num_heads, :, :]",
        "heads behind a removed one are rotated by its learned angles",
        "tests/vtp/model/test_eva.py -k removed_head",
    ),
    Defect(
        "vtp/pruning/dense_block.py",
        "prefix, patches = x[..., : attn.num_prefix_tokens, :], x[..., attn.num_prefix_tokens :, :]",
        "prefix, patches = x[..., :1, :], x[..., 1:, :]",
        "calibration and refit rotate registers as if they were patches, or fail",
        "tests/vtp/pruning/test_refit.py -k 'everything_kept and rotary'",
    ),
    Defect(
        "vtp/model/eva.py",
        "biases = tuple(weight.new_zeros(attn.proj.in_features) if b is None else b for b in biases)",
        "biases = tuple(b for b in biases if b is not None)",
        "the bias of values becomes that of keys",
        "tests/vtp/model/test_eva.py -k every_form",
    ),
    Defect(
        "vtp/pruning/compact.py",
        '{"attn.bias": scaled(constant, layer_scales(block)[0])}',
        '{"attn.bias": constant}',
        "a dead attention branch loses its LayerScale",
        "tests/vtp/pruning/test_compact.py -k any_architecture",
    ),
    Defect(
        "vtp/pruning/compact.py",
        "[(query * self.scale) @ key",
        "[(query * query.shape[-1] ** -0.5) @ key",
        "scores of a narrow key are scaled by its own width",
        "tests/vtp/pruning/test_compact.py -k narrow",
    ),
    Defect(
        "vtp/pruning/latency_table.py",
        "np.interp(widths, axis, node)",
        "np.interp(widths, axis, node) ** 2",
        "times between grid points are not interpolated linearly",
        "tests/vtp/pruning/test_latency_table.py -k interpolated",
    ),
    Defect(
        "vtp/pruning/latency_table.py",
        "widths.keys or ",
        "",
        "a table does not see that keys are narrow",
        "tests/vtp/pruning/test_latency_table.py -k keys",
    ),
    # -- vtp/training
    Defect(
        "vtp/training/frozen.py",
        "process.gather_for_metrics((features, own))",
        "process.gather((features, own))",
        "images that fill up the last batch of several processes vote twice",
        "tests/vtp/test_many_processes.py -k features",
    ),
    Defect(
        "vtp/training/loaders.py",
        "order[:images][place[0] :: place[1]].tolist()",
        "order[:images].tolist()",
        "every rank reads all images of a calibration",
        "tests/vtp/test_many_processes.py -k statistics",
    ),
    Defect(
        "vtp/training/sparsity.py",
        '"weight_decay": 0.0, "lr_scale"',
        '"weight_decay": config.weight_decay, "lr_scale"',
        "gates decay like weights",
        "tests/vtp/training/test_loop.py -k groups",
    ),
    Defect(
        "vtp/training/loop.py",
        "soft_threshold(self.gates, config.l1 * self._lr() * config.gate_lr)",
        "soft_threshold(self.gates, config.l1 * self._lr())",
        "the proximal step forgets the gates' own learning rate",
        "tests/vtp/training/test_loop.py -k proximal_step",
    ),
    Defect(
        "vtp/training/loop.py",
        "self.ema.update(self.raw, step=self.updates + 1)",
        "self.ema.update(self.raw)",
        "the moving average does not warm up by the updates so far",
        "tests/vtp/training/test_loop.py -k average",
    ),
    Defect(
        "vtp/training/sources.py",
        "if len(raw) != expected:",
        "if len(raw) < expected:",
        "an idx file with bytes behind its end is read",
        "tests/vtp/training/test_data.py -k idx",
    ),
    Defect(
        "vtp/training/data.py",
        "return tuple(sorted(names))",
        "return tuple(sorted(names, key=len))",
        "class folders are in another order than torchvision's",
        "tests/vtp/training/test_classes.py -k torchvision",
    ),
    Defect(
        "vtp/training/sources.py",
        "label if self.label_map is None else self.label_map[label]",
        "label",
        "labels of a folder are not mapped to the model's classes",
        "tests/vtp/training/test_classes.py -k another_order",
    ),
    Defect(
        "vtp/training/loop.py",
        "others[list(labels)] = False",
        "others[:] = False",
        "predictions are made among classes that the data do not have",
        "tests/vtp/training/test_classes.py -k enough_to_evaluate",
    ),
    Defect(
        "vtp/training/frozen.py",
        "if tied.any():",
        "if False:",
        "which of equally similar images are neighbours is left to chance",
        "tests/vtp/training/test_frozen.py -k equally_similar",
    ),
    Defect(
        "vtp/training/frozen.py",
        "(similarity.double() / temperature).softmax(dim=1)",
        "similarity.double()",
        "neighbours vote with their similarity itself",
        "tests/vtp/training/test_frozen.py -k definition",
    ),
    Defect(
        "vtp/training/frozen.py",
        "features[fitted], labels[fitted], penalty, weights)",
        "features, labels, penalty, weights)",
        "the penalty is chosen by images that were fitted",
        "tests/vtp/training/test_frozen.py -k left_out",
    ),
    Defect(
        "vtp/training/folders.py",
        "if name.lower().endswith(ENDINGS) and not _is_hidden(name):",
        "if name.lower().endswith(ENDINGS):",
        "copies that an editor keeps in a hidden folder are read as images",
        "tests/vtp/training/test_data.py -k skipped",
    ),
    Defect(
        "vtp/training/pixels.py",
        "brightest < NEAR_WHITE",
        "brightest < 0",
        "images of 12 bits in 16 become black",
        "tests/vtp/training/test_pixels.py -k unknown_scale",
    ),
    Defect(
        "vtp/model/images.py",
        'config["input_size"] = size',
        "pass",
        "a file says the image size of the weights that the model began with",
        "tests/vtp/test_checkpoint.py -k timm_configuration",
    ),
    Defect(
        "vtp/training/loaders.py",
        "skip=start * processes * batches.batch_size",
        "skip=start * batches.batch_size",
        "several processes resume an epoch too early",
        "tests/vtp/training/test_data.py -k processes",
    ),
    Defect(
        "vtp/training/loop.py",
        "in_update = number * accelerator.num_processes + accelerator.process_index",
        "in_update = number",
        "two processes mix their images and drop their paths alike",
        "tests/vtp/training/test_updates.py -k 'updates_of_one and random'",
    ),
    Defect(
        "vtp/training/loop.py",
        "accelerator.backward(loss / self.passes)",
        "accelerator.backward(loss)",
        "gradients grow with the passes of an update",
        "tests/vtp/training/test_updates.py -k passes_of_one",
    ),
    Defect(
        "vtp/training/loop.py",
        "            average_gradients(self.gates)\n",
        "            pass\n",
        "each process has gradients of its own for the gates of a sharded model",
        "tests/vtp/training/test_updates.py -k 'updates_of_one and fsdp'",
    ),
    Defect(
        "vtp/training/sharding.py",
        "    dist.all_reduce(squares)\n",
        "",
        "each process clips sharded gradients by the norm of its own part",
        "tests/vtp/training/test_updates.py -k 'updates_of_one and fsdp'",
    ),
    Defect(
        "vtp/training/loaders.py",
        "skip = max(0, skip - len(window))",
        "skip = 0",
        "an epoch of many shards is resumed too early",
        "tests/vtp/training/test_shards.py -k shuffled",
    ),
    Defect(
        "vtp/training/loaders.py",
        "reader.dist_rank = torch.distributed.get_rank() if processes > 1 else 0",
        "reader.dist_rank = 0",
        "all processes read the same shards of a stream",
        "tests/vtp/training/test_data_on_ranks.py -k stream",
    ),
    Defect(
        "vtp/training/shards.py",
        "if len(rest) < len(_END) or len(rest) > tarfile.RECORDSIZE or any(rest):",
        "if False:",
        "a shard that was cut short is taken for a whole one",
        "tests/vtp/training/test_shards.py -k damaged_shard",
    ),
    Defect(
        "vtp/training/shards.py",
        "found.st_size, found.st_mtime_ns, label_field)",
        "label_field)",
        "the index of a shard that was changed is that of the old one",
        "tests/vtp/training/test_shards.py -k index",
    ),
    Defect(
        "vtp/training/progress.py",
        "if self.asked is None or self.asked.query():",
        "if True:",
        "a GPU that computes is said to wait for images",
        "tests/vtp/training/test_loader_wait.py -k gpu",
    ),
    Defect(
        "vtp/training/state.py",
        '            _load(ema, parts["ema"])\n',
        "            pass\n",
        "a resumed run starts a new moving average",
        "tests/vtp/training/test_loop.py -k resumes",
    ),
    Defect(
        "vtp/training/teacher.py",
        "        return (pixels - self.mean) / self.std\n",
        "        return pixels\n",
        "a teacher gets pixels that are not normalised",
        "tests/vtp/training/test_teacher.py -k own_loader",
    ),
    Defect(
        "vtp/training/loop.py",
        "self.raw.set_distilled_training(self.teacher is not None)",
        "self.raw.set_distilled_training(False)",
        "a distillation token learns the labels",
        "tests/vtp/training/test_teacher.py -k each_head",
    ),
    Defect(
        "vtp/training/identity.py",
        'yield (images.reader.filename(index).replace(os.sep, "/"), size, label)',
        "yield (size, label)",
        "a run is resumed with other images",
        "tests/vtp/training/test_loop.py -k elsewhere",
    ),
    Defect(
        "vtp/training/signals.py",
        "        os.setpgid(0, 0)\n",
        "        pass\n",
        "Ctrl-C kills the workers that the last step waits for",
        "tests/vtp/training/test_loop.py -k signal_to_the_whole_group",
    ),
    Defect(
        "vtp/training/signals.py",
        "        signals.received = number\n        restore()\n",
        "        signals.received = number\n",
        "a second Ctrl-C is swallowed",
        "tests/vtp/training/test_signals.py",
    ),
    Defect(
        "vtp/training/ranks.py",
        "        if loss.rank != self.rank:\n",
        "        if False:\n",
        "rank 0 works on when another rank is gone",
        "tests/vtp/training/test_ranks.py -k works_for_long",
    ),
    Defect(
        "vtp/training/run_lock.py",
        "    os.register_at_fork(after_in_child=file.close)\n",
        "",
        "data workers keep the lock of a run that was killed",
        "tests/vtp/training/test_run_lock.py -k killed_one",
    ),
    Defect(
        "vtp/pruning/padded.py",
        "corner = corner.index_select(ctx.dim, places)",
        "corner = corner.narrow(ctx.dim, 0, len(places))",
        "gradients of padded heads are those of other columns",
        "tests/vtp/pruning/test_padded.py -k narrow_widths",
    ),
    Defect(
        "vtp/pruning/padded.py",
        "widths[least] + -sum(widths) % 8",
        "widths[least]",
        "attention beside ragged heads makes widths that are no multiple of 8",
        "tests/vtp/pruning/test_padded.py -k narrowest_head",
    ),
    Defect(
        "vtp/pruning/padded.py",
        "shape = tuple(sum(of.padded) for of in sections)",
        "shape = tuple(sum(of.own) for of in sections)",
        "weights are not padded, where activations are",
        "tests/vtp/pruning/test_padded.py -k multiples",
    ),
    # -- vtp/runtime
    Defect(
        "vtp/runtime/packed.py",
        "bias * scale.gamma.double()",
        "bias",
        "LayerScale is not folded into the bias",
        "tests/vtp/runtime/test_optimize.py -k float64",
    ),
    Defect(
        "vtp/runtime/cpu.py",
        "self.linear(weight / len(heads), bias / len(heads))",
        "self.linear(weight / len(heads), bias)",
        "the two heads of a distilled model add their biases",
        "tests/vtp/runtime/test_cpu.py -k 'close_to_float64 and distilled'",
    ),
    Defect(
        "vtp/runtime/cpu.py",
        "F.pad(cosines, before, value=1.0)",
        "F.pad(cosines, before)",
        "prefix tokens lose their queries and keys where patches are rotated",
        "tests/vtp/runtime/test_cpu_eva.py -k 'table or blocks_are'",
    ),
    Defect(
        "vtp/runtime/cpu.py",
        "list(heads.kept_heads) if",
        "list(range(heads.num_heads)) if",
        "heads that are left are rotated as the first ones",
        "tests/vtp/runtime/test_cpu_eva.py -k 'blocks_are and mixed'",
    ),
    Defect(
        "vtp/runtime/cpu.py",
        "norms = [p[_pairs_apart(len(p))] for p in norms]",
        "pass",
        "the norms of queries and keys keep an order that the rest has lost",
        "tests/vtp/runtime/test_cpu_eva.py -k 'blocks_are and qk-norm'",
    ),
    Defect(
        "vtp/runtime/cpu.py",
        "padded.unflatten(1, (-1, _PANEL)).transpose(0, 1)",
        "padded.flip(0).unflatten(1, (-1, _PANEL)).transpose(0, 1)",
        "the halves of a gated branch are packed the wrong way round",
        "tests/vtp/runtime/test_cpu_eva.py -k 'blocks_are and eva02'",
    ),
    Defect(
        "vtp/runtime/optimize.py",
        "    if features:\n        for block",
        "    if False:\n        for block",
        "a block puts out what constants of later blocks add",
        "tests/vtp/test_backbones.py -k constants",
    ),
    Defect(
        "vtp/runtime/cpu.py",
        "self.list[start:end], *after]",
        "self.list[self._starts[0] : ends[0]], *after]",
        "between blocks the first is run again and again",
        "tests/vtp/test_backbones.py -k intermediates_are",
    ),
    Defect(
        "vtp/runtime/optimize.py",
        "(size[0] % step[0] or size[1] % step[1])",
        "size[0] % step[0]",
        "images of a width that is no multiple of the patch are taken",
        "tests/vtp/runtime/test_optimize.py -k refused",
    ),
    Defect(
        "vtp/runtime/export/onnx.py",
        'dynamic_shapes=({0: torch.export.Dim("batch")},)',
        "dynamic_shapes=None",
        "the exported model takes two images and no other number",
        "tests/vtp/runtime/test_export.py",
    ),
    Defect(
        "vtp/runtime/export/checked.py",
        "if not (math.isfinite(error) and error <= bound):",
        "if False:",
        "a file that computes something else gets its name",
        "tests/vtp/runtime/test_export.py -k something_else",
    ),
    Defect(
        "vtp/runtime/export/checked.py",
        "BATCHES = (1, 5)",
        "BATCHES = (2,)",
        "a file that takes two images and no other number gets its name",
        "tests/vtp/runtime/test_export.py -k something_else",
    ),
    Defect(
        "vtp/pruning/compact.py",
        "F.scaled_dot_product_attention(q, k, v, scale=self.scale)",
        "F.scaled_dot_product_attention(q, k, v)",
        "scores of narrow keys are scaled otherwise in an exported program",
        "tests/vtp/pruning/test_compact.py -k narrow_keys",
    ),
    Defect(
        "vtp/hub.py",
        'overlay.setdefault("hf_hub_filename", WEIGHTS)',
        "pass",
        "pickled weights of a hub are read where there are no others",
        "tests/vtp/test_hub.py -k pickled",
    ),
    Defect(
        "vtp/hub.py",
        "checkpoint.check_indices(WEIGHTS, model, state)",
        "pass",
        "indices of a file from elsewhere are trusted",
        "tests/vtp/test_hub.py -k out_of_range",
    ),
    Defect(
        "vtp/hugging_face.py",
        '{"cls_token": tensors["cls_token"] + of_class, ',
        '{"cls_token": tensors["cls_token"], ',
        "the class token of a DINOv2 with registers has lost its position",
        "tests/vtp/test_hugging_face.py -k registers",
    ),
    Defect(
        "vtp/hugging_face.py",
        'for part in ("gate", "up")]',
        'for part in ("up", "gate")]',
        "gate and input of a SwiGLU are swapped",
        "tests/vtp/test_hugging_face.py -k swiglu",
    ),
    Defect(
        "vtp/hugging_face.py",
        "partial(LayerNorm, eps=config.layer_norm_eps)",
        "LayerNorm",
        "norms have timm's epsilon",
        "tests/vtp/test_hugging_face.py -k odd",
    ),
    Defect(
        "vtp/hugging_face.py",
        "if parts.get(name) != expected.get(name):",
        "if False:",
        "adapters and replaced layers of a transformers model are dropped in silence",
        "tests/vtp/test_hugging_face.py -k class_and_config",
    ),
    Defect(
        "vtp/hugging_face.py",
        "allow_patterns=wanted",
        "allow_patterns=None",
        "pickles and code of a hub are fetched",
        "tests/vtp/test_hugging_face.py -k hub",
    ),
    Defect(
        "vtp/hugging_face.py",
        "return share if math.floor(img_size / share) == wanted else",
        "return share if True else",
        "images of a transformers checkpoint are resized to a pixel less",
        "tests/vtp/test_hugging_face.py -k to_the_pixel",
    ),
    # -- the rest of vtp
    Defect(
        "vtp/timing.py",
        "for this, other in zip(own, reference, strict=True)",
        "for this, other in zip(sorted(own), sorted(reference), strict=True)",
        "ratios are not of times of the same round",
        "tests/vtp/test_timing.py",
    ),
    Defect(
        "vtp/comparison/comparison.py",
        "    if error <= bound:  # nor NaN",
        "    if error <= 100 * bound:  # nor NaN",
        "a runtime with wrong logits gets a figure",
        "tests/bench/test_compare.py -k wrong_logits",
    ),
    Defect(
        "vtp/report/markup.py",
        '<td class="number">{escape(cell)}</td>',
        '<td class="number">{cell}</td>',
        "text of a file becomes HTML of the report",
        "tests/vtp/report/test_report.py -k escaped",
    ),
    Defect(
        "vtp/files.py",
        "        temporary.unlink(missing_ok=True)\n",
        "        pass\n",
        "a write that fails leaves its temporary file",
        "tests/vtp/test_files.py",
    ),
    Defect(
        "vtp/checkpoint.py",
        "    if found != FORMAT_VERSION:",
        "    if found < FORMAT_VERSION:",
        "a file of a newer format is read",
        "tests/vtp/test_checkpoint.py -k 'newer or version'",
    ),
    Defect(
        "vtp/cli.py",
        "return 128 + error.signum",
        "return 1",
        "the exit status does not name the signal",
        "tests/vtp/command_line -k exit_status",
    ),
    Defect(
        "vtp/pipeline.py",
        'stage("sparse", insert_gates(dense), dense)',
        'stage("sparse", insert_gates(dense))',
        "sparse training has no teacher",
        "tests/vtp/test_pipeline.py -k leaves",
    ),
    # -- bench
    Defect(
        "bench/tables.py",
        "return min(times, key=lambda label",
        "return max(times, key=lambda label",
        "we are compared with the slowest runtime",
        "tests/bench/test_compare.py -k 'fastest or table'",
    ),
    Defect(
        "bench/compare.py",
        'if k != "date"}',
        'if k not in ("date", "threads")}',
        "figures of other numbers of threads share a table",
        "tests/bench/test_compare.py -k another_machine",
    ),
    # -- vtp_kernels
    Defect(
        "vtp_kernels/gated_linear.py",
        "total.add_(gate.sign(), alpha=l1)",
        "total.add_(gate, alpha=l1)",
        "the penalty's gradient is that of a square",
        "tests/vtp_kernels/test_gated_linear.py",
    ),
    Defect(
        "vtp_kernels/layer_norm_gather.py",
        "of_vectors.index_select(1, index)",
        "of_vectors[:, : len(index)]",
        "gradients of a norm are those of other columns",
        "tests/vtp_kernels/test_layer_norm_gather.py",
    ),
    Defect(
        "vtp_kernels/compact_linear.py",
        "out = F.gelu(z) if gelu else z",
        'out = F.gelu(z, approximate="tanh") if gelu else z',
        "GELU is the approximate one",
        "tests/vtp_kernels/test_compact_linear.py",
    ),
    Defect(
        "vtp_kernels/ragged_attention.py",
        "out=lse).mul_(math.log2(math.e))",
        "out=lse)",
        "the log-sum-exp is saved in another base than kernels read it in",
        "tests/vtp_kernels/test_ragged_attention.py",
    ),
    Defect(
        "vtp_kernels/ragged_attention.py",
        "2 * B * N * N * (sum(key_widths) + sum(value_widths))",
        "2 * B * N * N * (len(key_widths) * max(key_widths) + sum(value_widths))",
        "a narrow key counts as the widest",
        "tests/vtp_kernels/test_ragged_attention.py -k flops",
    ),
    Defect(
        "vtp_kernels/proofs/disassembly.py",
        '"64": 8, "128": 16',
        '"64": 8, "128": 8',
        "wide loads are taken for narrow ones",
        "tests/vtp_kernels/proofs/test_compilations.py -k 'instructions or narrow'",
    ),
    Defect(
        "vtp_kernels/proofs/roofline.py",
        "return 2 * a.M * a.N * a.K, 2 *",
        "return a.M * a.N * a.K, 2 *",
        "products have half their FLOPs",
        "tests/vtp_kernels/proofs/test_gating_roofline.py",
    ),
    # -- csrc
    Defect(
        "csrc/cpu/engine.cpp",
        "keys_before += a.key_widths[h];",
        "keys_before += a.key_widths[0];",
        "a key begins where it would if all were as wide as the first",
        "tests/vtp/runtime/test_cpu_native.py -k agrees",
    ),
    Defect(
        "csrc/cpu/engine.cpp",
        "t.width = norm.width;",
        "t.width = m_.embed_dim;",
        "a norm before proj or fc2 has the statistics of the first columns",
        "tests/vtp/runtime/test_cpu_native.py -k 'model_agrees'",
    ),
    Defect(
        "csrc/cpu/engine.cpp",
        "t.padding = head + 1 == heads ? round_up(a.total_width, k_.input_step) - a.total_width : 0;",
        "t.padding = 0;",
        "what the next layer reads behind the last head is not written",
        "tests/vtp/runtime/test_cpu_native.py -k 'agrees_with_plain_loops'",
    ),
    Defect(
        "csrc/cpu/engine.cpp",
        "t.padding = round_up(panels * kPanel, k_.input_step) - panels * kPanel;",
        "t.padding = 0;",
        "what the next layer reads behind an odd number of panels is not written",
        "tests/vtp/runtime/test_cpu_native.py -k 'model_agrees'",
    ),
    Defect(
        "csrc/cpu/amx_bf16.cpp",
        "if constexpr (TwoPanels) _tile_dpbf16ps(3, 5, 7);",
        "if constexpr (TwoPanels) _tile_dpbf16ps(3, 4, 7);",
        "a tile is of other rows",
        "tests/vtp/runtime/test_cpu_native.py -k 'kernel_agrees'",
    ),
    Defect(
        "csrc/cpu/trial.cpp",
        "right = right && std::memcmp(first.data(), out.data(), out.size() * 4) == 0;",
        "",
        "kernels that lose what is in a tile pass their self-test",
        "tests/vtp/runtime/test_cpu_native.py -k 'chosen'",
    ),
    Defect(
        "csrc/cpu/amx_support.cpp",
        'if (!machine.ask_for_tiles()) return "the system does not permit tiles";',
        "",
        "AMX is used where the system ends the process for it",
        "tests/vtp/runtime/test_cpu_native.py -k 'chosen'",
    ),
    Defect(
        "csrc/cpu/engine.cpp",
        "const int64_t table = a.tables[static_cast<size_t>(head)];",
        "const int64_t table = a.tables[0];",
        "all heads are rotated as the first one",
        "tests/vtp/runtime/test_cpu_native.py -k 'model_agrees'",
    ),
    Defect(
        "csrc/cpu/kernels_impl.h",
        "(b * c + a * s).store(second + i);",
        "(b * c - a * s).store(second + i);",
        "half of a pair is rotated the other way, where a vector is full",
        "tests/vtp/runtime/test_cpu_native.py -k 'kernel_agrees'",
    ),
    Defect(
        "csrc/cpu/kernels_impl.h",
        "store_as(to, silu(gate) * x);",
        "store_as(to, silu(x) * gate);",
        "SiLU is of the other half",
        "tests/vtp/runtime/test_cpu_native.py -k 'kernel_agrees'",
    ),
    Defect(
        "csrc/cpu/kernels_impl.h",
        "const int64_t size = inputs - k < chunk ? inputs - k : chunk;",
        "const int64_t size = chunk;",
        "a product reads past the last inputs",
        "tests/vtp/runtime/test_cpu_native.py -k 'agrees_with_plain_loops'",
    ),
    Defect(
        "csrc/cpu/gate_library.cpp",
        "for (int64_t block = 0; block < blocks; ++block)\n    for",
        "for (int64_t block = 0; block < 1; ++block)\n    for",
        "the gate's gradient is that of the first 32 rows",
        "tests/vtp_kernels/test_gated_linear.py",
        build=True,
    ),
    # -- the tests' own support
    Defect(
        "tests/support/numerics.py",
        "FACTOR = 2.0",
        "FACTOR = 200.0",
        "the error rule allows a hundred times the error",
        "tests/support/test_triton_harness.py -k error_rule_refuses",
    ),
    Defect(
        "tests/support/covering.py",
        "        missing -= combinations[best]\n",
        "        missing.clear()\n",
        "the quick lane runs one row of each product",
        "tests/support/test_covering.py",
    ),
]


def planted(text: str, defect: Defect) -> str:
    """The text of the file with the defect in it."""
    count = text.count(defect.old)
    assert count == 1, f"{defect.file}: {defect.old!r} occurs {count} times, expected 1"
    return text.replace(defect.old, defect.new)


def copy_of_the_tree(folder: Path) -> None:
    """What git tracks, and the built operators."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    built = [str(path.relative_to(ROOT)) for path in ROOT.glob("vtp_kernels/_cpu*.so")]
    for name in filter(None, [*tracked.split("\0"), *built]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def quick_lane(folder: Path, tests: str) -> tuple[int, str]:
    """Exit status and output of pytest for `tests`, in a fork of this process: it has PyTorch imported."""
    output = folder / "output.txt"
    child = os.fork()
    if child == 0:
        status = 3
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.chdir(folder)
            sys.path[0] = os.environ["PYTHONPATH"] = str(folder)
            sys.dont_write_bytecode = True
            options = ["-m", "not thorough", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
            status = pytest.main(options)
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, output.read_text(encoding="utf-8")


class Untold(Exception):
    """Whether a defect is caught cannot be told; the message says why."""


def caught_by(defect: Defect, folder: Path) -> str | None:
    """The first test of the quick lane that fails with the defect; None where all pass.

    Raises:
        Untold: nothing failed, but tests were skipped and the C++ operators are missing.
    """
    file, library = folder / defect.file, folder / LIBRARY
    before, built = file.read_text(encoding="utf-8"), library.read_bytes() if library.exists() else None
    file.write_text(planted(before, defect), encoding="utf-8")
    try:
        if defect.build:
            command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
        status, output = quick_lane(folder, defect.tests)
    finally:
        file.write_text(before, encoding="utf-8")
        if built is not None:
            library.write_bytes(built)
        else:
            library.unlink(missing_ok=True)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    if failed is None and status != 0:
        raise RuntimeError(f"{defect.file}: the tests did not run:\n{output[-4000:]}")
    skipped = re.search(r"(\d+) skipped", output)
    if failed is None and skipped and built is None and not defect.build:
        raise Untold(f"not known: {skipped[1]} tests were skipped and {LIBRARY} is not built")
    return failed and failed[1]


def main(texts: Sequence[str]) -> int:
    """Plant what is in files with one of `texts` in their path, all without any; see the top."""
    texts = texts or [""]
    for text in texts:
        if not any(text in defect.file for defect in DEFECTS):
            files = ", ".join(dict.fromkeys(defect.file for defect in DEFECTS))
            print(f"texts: got {text!r}, expected a part of one of {files}", file=sys.stderr)
            return 2
    console, missed, untold = Console(), 0, 0
    table = Table("file", "what is wrong", "caught by")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_the_tree(folder)
        for defect in (d for d in DEFECTS if any(text in d.file for text in texts)):
            try:
                test = caught_by(defect, folder)
                missed += test is None
            except Untold as reason:
                test = str(reason)
                untold += 1
            console.print(
                f"{defect.file}: {defect.wrong}: {test or 'NOT CAUGHT'}", soft_wrap=True, markup=False
            )
            table.add_row(defect.file, defect.wrong, test or "NOT CAUGHT")
    console.print(table)
    if missed:
        return 1
    return 2 if untold else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
