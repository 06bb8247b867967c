"""The checkpoint that a stage of training continues from: one safetensors file, no pickle.

Tensors, whole also where training has them sharded: "model/<name>", "ema/<name>" and
"optimizer/<key>/<parameter name>". The metadata entry
"vtp-training-state" is JSON: format version, identity (the settings that must be the same to continue),
position in the stage, the optimizer's parameter groups without their tensors, and the state of the loss
scaler, if any. "vtp-training-state-sha256" is the fingerprint of all that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vtp.files import FileError, fingerprint, write_atomic
from vtp.group import first_makes, world
from vtp.training.identity import translated
from vtp.training.ranks import begun_by_this_job, note_begun
from vtp.training.sharding import sharded_like, whole
from vtp.training.stage_models import StageModels

STATE_FORMAT = "vtp-training-state"
STATE_VERSION = 2  # 1 knew its data by where they were


class ResumeError(FileError):
    """A checkpoint that cannot be continued: damaged, not ours, or of a run configured differently."""


@dataclass
class Position:
    """How far a stage has come: what a checkpoint has to know beside the tensors."""

    epoch: int = 0  # epoch in progress; equal to config.epochs when the stage is finished
    step: int = 0  # next step of that epoch
    loss_sum: float = 0.0  # over the steps of that epoch
    seconds: float = 0.0  # spent on these steps
    waiting: float = 0.0  # of these seconds, for images
    history: list[dict[str, Any]] = field(default_factory=list)  # one record per finished epoch


class StageCheckpoint:
    """The checkpoint of a stage that several processes may train: all of them call its methods.

    path: of the file; identity: what must be the same for it to be continued, see `identity.stage_identity`.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity

    def is_continued(self, resume: bool) -> bool:
        """Whether there is one to continue from; one that is not to be continued is removed."""
        return first_makes(world(), lambda: self._clear_unless(resume))

    def _clear_unless(self, resume: bool) -> bool:
        job_has_begun = f"stage {self.path.resolve()}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not (resume or begun_by_this_job(job_has_begun)):
            self.path.unlink(missing_ok=True)
        note_begun(job_has_begun)
        return self.path.exists()

    def save(
        self,
        models: StageModels,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        position: Position,
    ) -> str | None:
        """Write the file. Where it would hold a NaN or an infinity none is written, and the name of the first
        tensor that has one is returned."""
        tensors, bad = gathered(
            state_tensors(models.raw, models.average, optimizer), keep=accelerator.is_main_process
        )
        if bad is not None:
            return bad
        scaler = accelerator.scaler
        header = {
            "identity": self.identity,
            "position": asdict(position),
            "param_groups": optimizer.state_dict()["param_groups"],
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        # All wait for it: if one ended by a signal before, torchrun would end rank 0 in the middle of it.
        first_makes(world(), lambda: write_state(self.path, tensors, header))
        return None

    def load(
        self, models: StageModels, optimizer: torch.optim.Optimizer, accelerator: Accelerator
    ) -> Position:
        """Put models, optimizer and loss scaler back where they were; returns where that is. Raises
        ResumeError."""
        tensors, header = read_state(self.path, self.identity)
        restore(tensors, header["param_groups"], models.raw, models.average, optimizer)
        if header["scaler"] is not None:
            accelerator.scaler.load_state_dict(header["scaler"])
        return Position(**header["position"])


def state_tensors(
    model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """All tensors that training continues from, under their names in the file; maybe sharded."""
    names = _parameter_names(model, optimizer)
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema/{name}": value for name, value in ema.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{key}/{names[index]}": value for key, value in state.items()}
    return tensors


def gathered(tensors: dict[str, Tensor], *, keep: bool) -> tuple[dict[str, Tensor], str | None]:
    """The tensors, whole and on the CPU where `keep`, else none; and the name of the first that has a NaN or
    an infinity, if there is one.

    Where they are sharded all processes have to call this. Each has no more than one whole tensor on its
    device at a time, and all come to the same answer.
    """
    kept, finite = {}, []
    for name, value in tensors.items():
        value = whole(value.detach())
        finite.append(value.isfinite().all())
        if keep:
            kept[name] = value.cpu().contiguous()
    device = finite[0].device  # one question to it; counts of steps may lie on the CPU
    if torch.stack([flag.to(device) for flag in finite]).all():
        return kept, None
    return kept, next(name for name, flag in zip(tensors, finite, strict=True) if not flag)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every element of every tensor is finite, with one synchronisation."""
    return bool(torch.stack([t.detach().isfinite().all() for t in tensors]).all())


def write_state(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors and header to `path`, atomically. Raises FileError where that cannot be done."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps({"version": STATE_VERSION, **header})
    metadata = {STATE_FORMAT: text, f"{STATE_FORMAT}-sha256": fingerprint(tensors, text)}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise FileError(f"path: cannot write {path}: {error}") from error

    write_atomic(path, write)


def read_state(path: Path, identity: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of the checkpoint of a run with this identity. Raises ResumeError otherwise."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies, because a tensor mapped from the file is aligned differently and would change with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ResumeError(f"{path}: truncated, damaged or not a safetensors file ({error})") from error
    if STATE_FORMAT not in metadata:
        raise ResumeError(f"{path}: not a training checkpoint: its metadata has no {STATE_FORMAT!r}")
    try:
        header = json.loads(metadata[STATE_FORMAT])
        version = header["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{path}: its description is damaged ({error})") from error
    if version != STATE_VERSION:
        raise ResumeError(
            f"{path}: training checkpoint of version {version}, expected {STATE_VERSION}: another vtp "
            "wrote it and can finish it; here begin the stage anew, without --resume"
        )
    if metadata.get(f"{STATE_FORMAT}-sha256") != fingerprint(tensors, metadata[STATE_FORMAT]):
        raise ResumeError(f"{path}: was changed after it was written (its SHA-256 does not match)")
    _refuse_other_run(path, header["identity"], identity)
    return tensors, header


def _refuse_other_run(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    saved = translated(saved, current)
    differing = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    if differing:
        changes = "; ".join(f"{n}: checkpoint {saved.get(n)!r}, now {current.get(n)!r}" for n in differing)
        images = saved.get("effective_batch")
        hint = f"; continue it with --effective-batch {images}" if "effective_batch" in differing else ""
        raise ResumeError(f"{path}: cannot be resumed with other settings: {changes}{hint}")


def restore(
    tensors: dict[str, Tensor],
    param_groups: list[dict[str, Any]],
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put the tensors, which every process has whole, back where `state_tensors` took them, in shards where
    those were. Raises ResumeError if they do not fit."""
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    index_of = {name: index for index, name in enumerate(_parameter_names(model, optimizer))}
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    try:
        _load(model, parts["model"])
        if ema is not None:
            _load(ema, parts["ema"])
        for name, value in parts["optimizer"].items():
            key, _, parameter = name.partition("/")
            state.setdefault(index_of[parameter], {})[key] = sharded_like(value, parameters[parameter])
        optimizer.load_state_dict({"state": state, "param_groups": param_groups})
    except (RuntimeError, KeyError, ValueError) as error:
        raise ResumeError(f"the checkpoint holds another model than that to train: {error}") from error


def _load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = model.state_dict()
    model.load_state_dict(
        {name: sharded_like(value, own[name]) if name in own else value for name, value in tensors.items()}
    )


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the order in which the optimizer's state_dict numbers them."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    return [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]
