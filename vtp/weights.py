"""Weights that others have written, for a timm model: checkpoints of DeiT and timm, plain safetensors.

No pickle is executed: `torch.load` reads tensors and plain values alone (`weights_only=True`).
"""

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.models import clean_state_dict, load_state_dict
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as filter_of_eva
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from vtp.files import FileError
from vtp.kinds import MODELS, WEIGHTS, kind_of, refuse_other_kinds
from vtp.model.eva import make_rotary_buffers


def is_safetensors(path: str | Path) -> bool:
    """Whether a file begins as safetensors files do: the length of a JSON header, and its brace."""
    with open(path, "rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and 8 + length <= os.path.getsize(path)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name; of several sets the averaged ones.

    Args:
        path: a safetensors file, or what `torch.save` wrote: tensors by name, or such under "state_dict_ema",
            "model_ema", "state_dict" or "model", the first of these that there is. Prefixes of wrappers
            ("module.", "_orig_mod."), and one that all names share, are taken away.

    Raises:
        FileError: there is no such file, it is damaged, would have to be executed, or holds something else.
    """
    if not Path(path).is_file() and not Path(path).is_dir():  # a pipe, say, would be waited for
        raise FileError(f"checkpoint: no file {path}")
    if kind_of(path) in MODELS.values():
        raise FileError(
            f"checkpoint: {path} is a model that vtp wrote, which needs no name: give it as the model"
        )
    refuse_other_kinds(path, WEIGHTS, name="checkpoint")
    state = _from_safetensors(path) if is_safetensors(path) else _from_pickle(path)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(state):
        odd = [str(name) for name in state if name not in tensors][:6]
        raise FileError(
            f"checkpoint: {path} has {', '.join(odd) or 'nothing'} where tensors were expected, by name or "
            "under state_dict_ema, model_ema, state_dict or model; write it with "
            "torch.save(model.state_dict(), FILE)"
        )
    prefixes = {name.partition(".")[0] for name in tensors}
    if len(prefixes) == 1 and prefixes != {"blocks"}:
        (prefix,) = prefixes
        tensors = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}
    return tensors


def _from_safetensors(path: str | Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return clean_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FileError(f"checkpoint: {path} is damaged or cut off ({error})") from error


def _from_pickle(path: str | Path) -> dict[str, Any]:
    try:
        return load_state_dict(str(path), use_ema=True, weights_only=True)
    except Exception as error:  # torch.load raises errors of all kinds
        foreign: list[str] = []
        with contextlib.suppress(Exception):
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        if foreign := sorted(set(foreign) - {"argparse.Namespace"}):  # which timm lets through
            raise FileError(
                f"checkpoint: {path} holds objects of Python ({', '.join(foreign[:4])}), which reading would "
                "execute; where you trust it, write its weights alone: torch.save(torch.load(FILE, "
                "weights_only=False)['model'], OTHER)"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise FileError(
            f"checkpoint: {path} is no checkpoint of PyTorch and no safetensors file, or it is damaged or "
            f"cut off ({type(error).__name__}: {reason})"
        ) from error


def model_arguments(state: dict[str, Tensor], model: VisionTransformer | Eva) -> dict[str, Any]:
    """Arguments of `timm.create_model` in which a checkpoint differs from the model of that name.

    Args:
        state: from `read_weights`; model: of the name, with or without storage.
    """
    found: dict[str, Any] = {}
    if not {"patch_embed.proj.weight", "pos_embed"} & state.keys():
        return found  # of authors who have other names, and of the model as it was released
    head, patch, positions = (state.get(n) for n in ("head.weight", "patch_embed.proj.weight", "pos_embed"))
    if (classes := 0 if head is None else len(head)) != model.num_classes:
        found["num_classes"] = classes
    if "fc_norm.weight" in state and "norm.weight" not in state:
        found["global_pool"] = "avg"
    step = model.patch_embed.patch_size
    if patch is not None and patch.ndim == 4:
        if patch.shape[1] != model.patch_embed.proj.in_channels:
            found["in_chans"] = patch.shape[1]
        if tuple(patch.shape[2:]) != tuple(step):
            found["patch_size"] = step = tuple(patch.shape[2:])
    if positions is not None and positions.ndim == 3 and model.pos_embed is not None:
        patches = positions.shape[1] - (0 if model.no_embed_class else model.num_prefix_tokens)
        side = math.isqrt(max(patches, 0))
        size = (side * step[0], side * step[1])
        if side and side * side == patches and size != tuple(model.patch_embed.img_size):
            found["img_size"] = size
    return found


def load_weights(
    model: VisionTransformer | Eva, state: dict[str, Tensor], name: str, path: str | Path
) -> None:
    """Give a model the tensors of a checkpoint, all of them and nothing else.

    Args:
        model: of the arguments that `model_arguments` found, without storage; afterwards it is on the CPU, in
            float32.
        state: from `read_weights`; names of earlier timm and of the authors' code are timm's afterwards.
        name, path: of both, for messages.

    Raises:
        FileError: tensors are missing, left over or of another shape.
    """
    own = model.state_dict()
    given = state.get("pos_embed")
    native = "mask_token" not in state  # DINOv2's own, which has its class token elsewhere
    if native and given is not None and "pos_embed" in own and given.shape != own["pos_embed"].shape:
        raise FileError(
            f"checkpoint: pos_embed of {path} has shape {tuple(given.shape)}, that of {name} "
            f"{tuple(own['pos_embed'].shape)}, for images of {tuple(model.patch_embed.img_size)}; a model of "
            "another width or depth than its name says is opened by local-dir:FOLDER, whose config.json has "
            "them in model_args"
        )
    try:
        if isinstance(model, Eva):
            state = filter_of_eva(state, model)
        else:
            state = checkpoint_filter_fn(state, model, adapt_layer_scale=True)
    except Exception as error:  # of what looks like one of the formats that it converts, and is not
        raise FileError(f"checkpoint: timm cannot read the tensors of {path} ({error!r})") from error
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for names, what in ((missing, "missing"), (extra, "left over"))
            if names
        ]
        raise FileError(
            f"checkpoint: of the tensors of {name}, those in {path} have {' and '.join(parts)}; is it of "
            f"another model?{_foreign_names(extra)}"
        )
    for tensor_name, tensor in state.items():
        if tensor.shape != own[tensor_name].shape or not tensor.is_floating_point():
            raise FileError(
                f"checkpoint: {tensor_name} of {path} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"floating point {tuple(own[tensor_name].shape)} for {name}"
            )
    own_memory = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in state.items()}
    make_rotary_buffers(model, torch.device("cpu"), torch.float32)
    model.load_state_dict(own_memory, assign=True)


def _foreign_names(names: list[str]) -> str:
    """What tensors that no timm model has are likely to be, as the end of an error message."""
    inside = [name for name in names if name.endswith(".patch_embed.proj.weight")]
    if inside:
        prefix = inside[0].removesuffix("patch_embed.proj.weight")
        return f" Those under {prefix!r} look like its: write them alone, without that prefix"
    for library, part in (
        ("Hugging Face's transformers", "encoder.layer."),
        ("torchvision", "encoder.layers."),
    ):
        if any(part in name for name in names):
            return f" They are named as in {library}, expected timm's names"
    return ""
