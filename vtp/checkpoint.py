"""Models in one safetensors file: tensors beside a JSON description that rebuilds the model; no pickle.

The metadata entry "vtp" of the file is JSON with these fields:

    format_version   of this layout; a file with a newer one is refused
    kind             "dense", "gated" or "compact"
    architecture     the fields of vtp.model.architecture.Architecture
    plan             of a compact model: kept indices, scores, budget, parent fingerprint; else null
    pretrained_cfg   timm's description of the baseline (name, ...), of the images that the model expects
                     (input_size, mean, std, ...) and of its classes (label_names); null in older files
    versions         of vtp, torch and timm that wrote the file
    user             what the caller added
    sha256           over all tensors and the fields above: damage and careless edits are noticed, but it is
                     no signature
"""

import copy
import dataclasses
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn

from vtp.files import FileError, fingerprint, refuse_meta, write_atomic
from vtp.kinds import MODELS, refuse_other_kinds
from vtp.model.architecture import (
    Architecture,
    UnsupportedModelError,
    describe,
    describe_surroundings,
    refuse_changed_behaviour,
)
from vtp.model.eva import make_rotary_buffers, other_angles, with_fused_sites
from vtp.model.images import described, without_source
from vtp.pruning.compact import CompactModel, LayerNormGather, empty_compact
from vtp.pruning.gates import GatedLinear, insert_gates
from vtp.pruning.plan import PruningPlan

FORMAT_VERSION = 1
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "architecture": dict,
    "plan": (dict, NoneType),
    "pretrained_cfg": (dict, NoneType),
    "versions": dict,
    "user": dict,
}
# Modules that differ with the training settings and not in what an evaluated model computes.
_TRAINING_ONLY = (nn.Dropout, nn.Identity, DropPath, PatchDropout)


def save(model: nn.Module, path: str | Path, *, metadata: dict[str, Any] | None = None) -> None:
    """Write a dense, gated or compact model to one safetensors file, atomically.

    Args:
        model: a supported timm VisionTransformer or Eva (whose file has one matrix for queries, keys and
            values, and one for both halves of SwiGLU), or what `insert_gates` or `compact` made of one.
        path: the file; its folder must exist.
        metadata: JSON-able values of your own, returned by `read_metadata(path)["user"]`.

    Raises:
        UnsupportedModelError: the model is not one that can be rebuilt from its description, for example
            because a module of it was replaced after the cut.
        TypeError: `metadata` is no dictionary of JSON-able values.
        FileError: the file cannot be written; nothing is left behind.
    """
    if metadata is not None and not isinstance(metadata, dict):
        raise TypeError(f"metadata: got {type(metadata).__name__}, expected a dictionary")
    _refuse_tied_parameters(model)
    if (name := other_angles(model)) is not None:
        raise UnsupportedModelError(
            f"rope.{name}: it is not what the settings of the rotary embedding give, which a file has alone; "
            "was the model in a half precision before? model.rope.init_non_persistent_buffers() makes it anew"
        )
    fields = _describe(model, metadata)
    if fields["kind"] == "dense" and fields["architecture"]["eva"] is not None:
        model = with_fused_sites(copy.deepcopy(model))
    _refuse_changed_modules(model, _rebuild(fields))
    refuse_meta(model.state_dict())
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    description = json.dumps(fields)
    digest = fingerprint(tensors, description)
    header = {"format": "pt", "vtp": description, "vtp_sha256": digest}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:
            raise FileError(f"path: cannot write {path}: {error}") from error

    write_atomic(path, write)


def load(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Read a model written by `save`: a timm model, a gated one or a compact one, in eval mode.

    Raises:
        FileError: the file is missing, cut off, damaged, not of this format, or of a newer one.
    """
    description = read_metadata(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            # Tensors mapped from the file are less aligned than torch's own, which changes how products
            # are rounded, and would change with the file: take copies.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FileError(f"path: {path} is damaged or cut off ({error})") from error
    if header.get("vtp_sha256") != fingerprint(tensors, header["vtp"]):
        raise FileError(f"path: {path} was changed after it was written (its SHA-256 does not match)")
    try:
        model = _rebuild(description)
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"path: {path} describes no model that can be built ({error})") from error
    _check_tensors(path, model, tensors)
    make_rotary_buffers(model, torch.device("cpu"), tensors["patch_embed.proj.weight"].dtype)
    model.load_state_dict(tensors, assign=True)
    _restore_pretrained_cfg(model, description["pretrained_cfg"])
    return model.to(device).eval()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The description in a file (see the module's docstring) without reading its tensors.

    Raises:
        FileError: as `load`, but for damage within the tensors.
    """
    if not Path(path).is_file():  # a pipe, say, would be waited for
        refuse_other_kinds(path, *MODELS.values())
        raise FileError(f"path: no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        refuse_other_kinds(path, *MODELS.values())
        raise FileError(f"path: {path} is no safetensors file, or it is cut off ({error})") from error
    if "vtp" not in header:
        refuse_other_kinds(path, *MODELS.values())
    try:
        description = json.loads(header["vtp"])
        found = description["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(f"path: the description in {path} is damaged ({error})") from error
    if found != FORMAT_VERSION:
        raise FileError(
            f"path: {path} has format version {found}, this vtp reads {FORMAT_VERSION}; update vtp to read it"
        )
    for name, kinds in _FIELDS.items():
        if not isinstance(description.get(name, ...), kinds):
            raise FileError(
                f"path: the description in {path} is damaged: {name} is missing or of another type"
            )
    return description


def _describe(model: nn.Module, metadata: dict[str, Any] | None) -> dict[str, Any]:
    if isinstance(model, CompactModel):
        refuse_changed_behaviour(model)
        kind, plan = "compact", model.plan
        architecture = dataclasses.replace(plan.architecture, **describe_surroundings(model))
    else:
        kind, plan = "dense", None
        if any(isinstance(module, GatedLinear) for module in model.modules()):
            kind = "gated"
        architecture = describe(model)
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "architecture": dataclasses.asdict(architecture),
        "plan": None if plan is None else plan.to_dict(),
        "pretrained_cfg": plain_pretrained_cfg(model),
        "versions": {name: _version(name) for name in ("vtp", "torch", "timm")},
        "user": metadata or {},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # running from a source tree that is not installed
        return "unknown"


def _rebuild(description: dict[str, Any]) -> nn.Module:
    """The described model on the meta device."""
    architecture = Architecture.from_dict(description["architecture"])
    kind = description["kind"]
    if kind == "compact":
        plan = PruningPlan.from_dict(description["plan"])
        return empty_compact(dataclasses.replace(plan, architecture=architecture))
    if kind not in ("dense", "gated"):
        raise ValueError(f"kind: got {kind!r}, expected 'dense', 'gated' or 'compact'")
    dense = architecture.build("meta", weight_init="skip")
    return insert_gates(dense) if kind == "gated" else dense


def _refuse_tied_parameters(model: nn.Module) -> None:
    """A file holds one tensor for each name: loading would silently untie them."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if owners.setdefault(id(parameter), name) != name:
            raise UnsupportedModelError(f"model: {name} is the same parameter as {owners[id(parameter)]}")


def _refuse_changed_modules(model: nn.Module, rebuilt: nn.Module) -> None:
    """Refuse a model that differs from what its file would be read as."""
    got, expected = (
        {
            name: repr(module)
            for name, module in either.named_modules()
            if not any(module.children()) and not isinstance(module, _TRAINING_ONLY)
        }
        | {
            name: f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            for name, value in either.state_dict().items()
        }
        for either in (model, rebuilt)
    )
    odd = sorted({name for name, _ in got.items() ^ expected.items()})
    if odd:
        raise UnsupportedModelError(
            f"model: {odd[0]} is {got.get(odd[0], 'missing')}, expected {expected.get(odd[0], 'none')}; "
            f"a file could not bring back {', '.join(odd[:4])}. Save the model before layers of it are "
            "quantized, or once adapters are merged; what vtp.load reads can be quantized again"
        )


def _check_tensors(path: str | Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    expected = model.state_dict()
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise FileError(f"path: tensors {odd[:4]} of {path} are missing or not part of the described model")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise FileError(
                f"path: tensor {name} of {path} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(expected[name].shape)}"
            )
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise FileError(f"path: tensor {name} of {path} has dtype {tensor.dtype}, expected another kind")
    check_indices(path, model, tensors)


def check_indices(path: str | Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raises FileError where an index among the tensors of a file is out of range: a kernel that trusts it
    would read foreign memory."""
    for name, module in model.named_modules():
        if isinstance(module, LayerNormGather) and module.index is not None:
            index = tensors.get(f"{name}.index")
            if index is None or index.dtype != torch.int64 or not ((index >= 0) & (index < module.dim)).all():
                raise FileError(f"path: {name}.index of {path} is not within [0, {module.dim})")


def plain_pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """The plain values of timm's description; it may also carry weights or objects, which do not belong."""
    return {name: value for name, value in described(model).items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):  # descriptions of classes, and no state dict, whose values are tensors
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    return value is None or isinstance(value, (str, int, float, bool))


def _restore_pretrained_cfg(model: nn.Module, fields: dict[str, Any] | None) -> None:
    if fields is not None:
        config = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        if isinstance(model, CompactModel):  # a file of before may say where the dense model's weights are
            config = without_source(config)
        model.pretrained_cfg = model.default_cfg = config


__all__ = ["FORMAT_VERSION", "FileError", "UnsupportedModelError", "load", "read_metadata", "save"]
