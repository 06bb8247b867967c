"""Checkpoints of Hugging Face's transformers by name, as timm models: `--model hf:OWNER/NAME` or `hf:FOLDER`.

Weights are read from safetensors alone, no code of a checkpoint is executed. What an image processor says of
the images comes along.
"""

import contextlib
import importlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from torch import nn

from vtp.files import FileError
from vtp.hugging_face import KINDS, PREFIX, from_transformers, quiet, source_of
from vtp.model.architecture import UnsupportedModelError
from vtp.model.images import set_image_config

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_ADAPTER = "adapter_config.json"
_SHARD = re.compile(r"[\w.-]+\.safetensors")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def open_transformers(name: str, *, from_scratch: bool = False) -> nn.Module:
    """The timm model of a checkpoint of transformers, on the CPU, in float32 and eval mode.

    Args:
        name: "OWNER/NAME" on the Hugging Face hub, or a folder with config.json and model.safetensors.
        from_scratch: new weights, as transformers draws them, instead of the checkpoint's.

    Raises:
        FileError: transformers is missing; there is no such checkpoint, it has no safetensors, or misses
            tensors.
        UnsupportedModelError: see `from_transformers`.
    """
    transformers, cls, config = _read_config(name)
    if from_scratch:
        with _in_words(name), quiet():
            model = cls(config)
        return _converted(model, None, name)
    folder = _folder(name)
    _refuse_other_files(name, folder)
    processor = None
    with _in_words(name), quiet():
        model, loaded = cls.from_pretrained(
            folder, config=config, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        if any((folder / file).is_file() for file in _PROCESSORS):
            processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    unused = ("pooler.", "embeddings.mask_token", f"{KINDS[cls.__name__].backbone}.embeddings.mask_token")
    missing = sorted(key for key in loaded["missing_keys"] if not key.startswith(unused))
    if missing or loaded["mismatched_keys"]:
        odd = missing or sorted(str(key) for key in loaded["mismatched_keys"])
        what = "has no" if missing else "has another shape of"
        raise FileError(f"model: {PREFIX}{name} {what} {', '.join(odd[:4])}, which a {cls.__name__} needs")
    return _converted(model, processor, name)


def _converted(model: nn.Module, processor: Any, name: str) -> nn.Module:
    made = from_transformers(model.float().eval(), image_processor=processor)
    set_image_config(made, architecture=source_of(name))
    return made


def without_weights(name: str) -> nn.Module:
    """The same without storage, from the config alone; to refuse what is not supported early."""
    _, cls, config = _read_config(name)
    with torch.device("meta"), _in_words(name), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which the model with weights gives
        return from_transformers(cls(config))


def _read_config(name: str) -> tuple[Any, Any, Any]:
    """transformers, the class of a checkpoint, and its config."""
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise FileError(
            f"model: {PREFIX}{name} needs transformers: pip install 'vtp[transformers]'"
        ) from error
    file = _file(name, _CONFIG)
    with _in_words(name), quiet():
        config = transformers.AutoConfig.from_pretrained(file.parent, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"model: {PREFIX}{name} is quantized; expected weights of floating point: quantize after pruning"
        )
    cls = (config.architectures or ["model whose config.json names no class"])[0]
    if cls not in KINDS:
        raise UnsupportedModelError(
            f"model: {PREFIX}{name} is a {cls}, expected one of transformers' {', '.join(KINDS)}"
        )
    return transformers, getattr(transformers, cls), config


def _is_local(name: str) -> bool:
    if name and Path(name).is_dir():
        return True
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is None:
        raise FileError(
            f"model: got {PREFIX}{name}, expected {PREFIX}FOLDER with config.json and model.safetensors, or "
            f"{PREFIX}OWNER/NAME of the hub; there is no such folder"
        )
    return False


def _file(name: str, file: str) -> Path:
    """A file of a checkpoint, fetched where it is on the hub."""
    if not _is_local(name):
        with _in_words(name):
            return Path(hf_hub_download(name, file))
    path = Path(name) / file
    if not path.is_file():
        raise FileError(f"model: {PREFIX}{name} has no {file}; expected what model.save_pretrained writes")
    return path


def _folder(name: str) -> Path:
    """The folder of a checkpoint; of the hub's JSON and safetensors are fetched into one, nothing else."""
    if _is_local(name):
        return Path(name)
    shards = "model-?????-of-?????.safetensors"
    wanted = [_CONFIG, _ADAPTER, *_PROCESSORS, *_WEIGHTS, shards]
    with _in_words(name):
        return Path(snapshot_download(name, allow_patterns=wanted))


def _refuse_other_files(name: str, folder: Path) -> None:
    """Refuse a checkpoint without safetensors, and one whose weights are only a part of the model."""
    if (folder / _ADAPTER).is_file():
        raise UnsupportedModelError(
            f"model: {PREFIX}{name} holds an adapter ({_ADAPTER}); save what model.merge_and_unload() returns"
        )
    whole, index = (folder / file for file in _WEIGHTS)
    if whole.is_file():
        return
    if index.is_file():
        with _in_words(name):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if odd := sorted(shard for shard in shards if _SHARD.fullmatch(shard) is None):
            raise FileError(
                f"model: {index.name} of {PREFIX}{name} names {odd[0]}, expected safetensors files"
            )
        return
    pickled = [file for file in _PICKLES if (folder / file).is_file()]
    has = f"{pickled[0]}, a pickle, which is not read" if pickled else "no weights"
    raise FileError(
        f"model: {PREFIX}{name} has {has}; expected model.safetensors, as transformers writes it: "
        "model.save_pretrained(FOLDER)"
    )


@contextlib.contextmanager
def _in_words(name: str) -> Iterator[None]:
    """Failures of a network, a hub, a file and transformers, which are of all kinds, as FileError."""
    try:
        yield
    except (FileError, UnsupportedModelError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise FileError(
            f"model: transformers cannot open {PREFIX}{name} ({type(error).__name__}: {reason})"
        ) from error
