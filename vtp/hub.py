"""Compact models as timm keeps models: in a folder or on the Hugging Face hub, made again by `create_model`.

After `import vtp` timm knows the architecture `vtp_compact_vit`. What it is made from, the plan without its
scores, lies in `model_args` of config.json, and the weights in model.safetensors:

    vtp.save_pretrained(small, "deit_b_40")
    timm.create_model("local-dir:deit_b_40", pretrained=True)
    vtp.push_to_hub(small, "me/deit_b_40")
    timm.create_model("hf-hub:me/deit_b_40", pretrained=True)
"""

import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, push_to_hf_hub, register_model
from timm.models._hub import generate_readme, save_config_for_hf
from timm.models._pretrained import PretrainedCfg
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as filter_of_eva
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vtp import checkpoint
from vtp.files import FileError, write_atomic
from vtp.model.architecture import Architecture, describe_surroundings
from vtp.model.cost import count
from vtp.model.images import image_config
from vtp.pruning.compact import CompactDistilledViT, CompactModel, new_compact
from vtp.pruning.plan import PlanError, PruningPlan

ARCHITECTURE = "vtp_compact_vit"
WEIGHTS = "model.safetensors"
MOST_INDICES = 2**20  # of a layer, in a plan from elsewhere: they are listed before they are compared

__all__ = ["push_to_hub", "save_pretrained"]


def save_pretrained(
    model: CompactModel, folder: str | Path, *, metadata: dict[str, Any] | None = None
) -> None:
    """Write a compact model as a folder that timm opens: model.safetensors, config.json and README.md.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` makes the model again, where vtp was imported;
    num_classes, img_size, in_chans, drop rates and features_only work as for timm's own. `vtp.load` reads
    model.safetensors too.

    Args:
        model: from `vtp.compact` or `vtp.load`. It is not changed.
        folder: made where it is missing; files of these names in it are replaced.
        metadata: what else is known of the model, JSON-able, such as {"top1": 81.2}; for the model card, and
            as in `vtp.save`.

    Raises:
        TypeError: the model is no compact one, or `metadata` no dictionary of JSON-able values.
        UnsupportedModelError: the model cannot be rebuilt from its plan, as a module of it was replaced.
        FileError: a file cannot be written.
    """
    _check_compact(model)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"folder: cannot make {folder}: {error.strerror or error}") from error
    exported, arguments = _as_timm_has_it(model), _arguments(model)
    checkpoint.save(model, folder / WEIGHTS, metadata=metadata)
    card = _card(model, metadata or {}, f"local-dir:{folder.name}")
    text = generate_readme(card, folder.name, task_name=_task(model))
    write_atomic(folder / "README.md", lambda file: file.write_text(text, encoding="utf-8"))
    # The last, as without it timm opens no folder.
    write_atomic(folder / "config.json", lambda file: save_config_for_hf(exported, str(file), **arguments))


def push_to_hub(
    model: CompactModel, repo_id: str, *, metadata: dict[str, Any] | None = None, **options: Any
) -> Any:
    """Upload a compact model to the Hugging Face hub, by `timm.models.push_to_hf_hub`, as safetensors alone.

    `timm.create_model("hf-hub:REPO_ID", pretrained=True)` makes the model again, where vtp was imported.

    Args:
        repo_id: "owner/name".
        model, metadata: as in `save_pretrained`.
        options: others of timm's function: private, token, revision, commit_message, create_pr.

    Returns:
        What timm's function returns.

    Raises:
        As `save_pretrained`, and what the hub's client raises.
    """
    with tempfile.TemporaryDirectory() as folder:  # refuses what cannot be made again
        save_pretrained(model, folder, metadata=metadata)
    return push_to_hf_hub(
        _as_timm_has_it(model),
        repo_id,
        model_card=_card(model, metadata or {}, f"hf-hub:{repo_id}"),
        task_name=_task(model),
        safe_serialization=True,
        **_arguments(model),
        **options,
    )


@register_model
def vtp_compact_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A compact vision transformer, for `timm.create_model`: what `save_pretrained` and `push_to_hub` wrote.

    Args:
        kwargs: `plan`, from the model's config.json, and fields of `Architecture` that replace the plan's.
    """
    source = kwargs.get("pretrained_cfg")
    if pretrained and isinstance(source, dict) and source.get("source") == "local-dir":
        file = Path(source["file"]) / WEIGHTS
        if not file.is_file():  # timm would look for pickled weights
            raise FileError(f"model_name: no file {file}, the only weights that are read")
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    overlay.setdefault("hf_hub_filename", WEIGHTS)  # likewise
    return build_model_with_cfg(
        _build,
        ARCHITECTURE,
        pretrained,
        pretrained_filter_fn=_checked_tensors,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        pretrained_cfg_overlay=overlay,
        **kwargs,
    )


def _build(plan: dict[str, Any] | None = None, **fields: Any) -> CompactModel:
    if plan is None:
        raise PlanError(
            f"plan: missing; {ARCHITECTURE} is made from what vtp.save_pretrained wrote, by "
            "'local-dir:FOLDER' or 'hf-hub:OWNER/NAME'"
        )
    cut = _unpacked(plan)
    known = {field.name for field in dataclasses.fields(Architecture)}
    # The plan is about the others.
    of_blocks = {"embed_dim", "depth", "num_heads", "mlp_hidden", "glu", "scale_attn_norm", "scale_mlp_norm"}
    free = known - of_blocks - {"distilled", "eva"}
    if unknown := sorted(set(fields) - free):
        raise TypeError(
            f"{ARCHITECTURE}: got {', '.join(unknown)}, expected some of {', '.join(sorted(free))}"
        )
    for name in ("img_size", "patch_size"):
        if name in fields:
            size = fields[name]
            fields[name] = (size, size) if isinstance(size, int) else tuple(size)
    architecture = dataclasses.replace(cut.architecture, **fields)
    cut = dataclasses.replace(cut, architecture=architecture)
    return new_compact(cut)


def _checked_tensors(state: dict[str, Tensor], model: CompactModel) -> dict[str, Tensor]:
    """What a file holds as the model takes it: position embeddings in its size. Raises FileError."""
    checkpoint.check_indices(WEIGHTS, model, state)
    return (filter_of_eva if isinstance(model, Eva) else checkpoint_filter_fn)(state, model)


# --------------------------------------------------------------------------------
# What config.json and the card say


def _check_compact(model: nn.Module) -> None:
    if not isinstance(model, CompactModel):
        raise TypeError(
            f"model: got {type(model).__name__}, expected one from vtp.compact; timm.models.save_for_hf "
            "writes a dense model"
        )


def _arguments(model: CompactModel) -> dict[str, Any]:
    """Of timm's functions: what makes the model again, and what a reader wants to know of it."""
    plan = _plan(model)
    cost, dense = count(model), plan.dense_cost
    about: dict[str, Any] = {"parent": _parent(model), "fingerprint_of_parent": plan.parent}
    about |= {
        "macs": cost.macs,
        "params": cost.params,
        "dense_macs": dense.macs,
        "dense_params": dense.params,
    }
    return {
        "model_args": {"plan": _packed(plan)},
        "model_config": {"architecture": ARCHITECTURE, "vtp": about},
    }


def _plan(model: CompactModel) -> PruningPlan:
    """The plan with what may have changed since the cut: head, image size."""
    architecture = dataclasses.replace(model.plan.architecture, **describe_surroundings(model))
    return dataclasses.replace(model.plan, architecture=architecture)


def _as_timm_has_it(model: CompactModel) -> CompactModel:
    """The same modules with a complete `pretrained_cfg`, as timm's functions expect."""
    same = copy.copy(model)
    said = dict(getattr(model, "pretrained_cfg", None) or {})
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    plain = {name: value for name, value in checkpoint.plain_pretrained_cfg(model).items() if name in known}
    config = PretrainedCfg(**{**plain, **image_config(model)}).to_dict(remove_source=True)
    config |= {
        "architecture": ARCHITECTURE,
        "num_classes": model.num_classes,
        "fixed_input_size": not model.dynamic_img_size,
        "first_conv": "patch_embed.proj",
        "classifier": ("head", "head_dist") if isinstance(model, CompactDistilledViT) else "head",
        "description": said.get("description") or f"{_parent(model)}, cut by vtp",
    }
    same.pretrained_cfg = same.default_cfg = config
    same._model_args = {}
    return same


def _parent(model: CompactModel) -> str:
    said = getattr(model, "pretrained_cfg", None) or {}
    if said.get("architecture") == ARCHITECTURE:  # was opened by timm
        return str(said.get("description")).removesuffix(", cut by vtp")
    name = said.get("architecture") or "a vision transformer"
    return f"{name}.{said['tag']}" if said.get("tag") else str(name)


def _card(model: CompactModel, metadata: dict[str, Any], source: str) -> dict[str, Any]:
    """The model card, as timm's `generate_readme` takes it."""
    plan, cost, said = _plan(model), count(model), getattr(model, "pretrained_cfg", None) or {}
    dense, image = plan.dense_cost, image_config(model)
    budget = ", ".join(f"{name} {value:g}" for name, value in plan.budget.items())
    details = {
        "Parent": f"{_parent(model)}" + (f" (weights {plan.parent[:16]})" if plan.parent else ""),
        "Cut": {
            "budget": budget,
            "ranking": f"{plan.score}, {plan.scope}",
            "dimensions removed": f"{plan.rate:.1%}",
        },
        "Model Stats": {
            "Params (M)": f"{cost.params / 1e6:.2f} of {dense.params / 1e6:.2f}",
            "GMACs": f"{cost.macs / 1e9:.3f} of {dense.macs / 1e9:.3f}",
            "Image size": " x ".join(map(str, image["input_size"][1:])),
        },
    }
    if metadata:
        details["Said by its makers"] = {str(name): value for name, value in metadata.items()}
    usage = (
        "It needs the package vtp, which tells timm how to make it.\n\n"
        "```python\nimport timm\nimport vtp\n\n"
        f"model = timm.create_model({source!r}, pretrained=True).eval()\n"
        "config = timm.data.resolve_model_data_config(model)\n"
        "transform = timm.data.create_transform(**config, is_training=False)\n"
        "fast = vtp.optimize(model)  # packed weights, for inference\n```\n\n"
        f"```\n{plan}\n```"
    )
    return {
        "description": "A vision transformer whose layers and heads have widths of their own, cut by vtp.",
        "details": details,
        "usage": usage,
        "license": said.get("license") or "unknown",
        "library_name": "vtp",
        "tags": [_task(model), "timm", "vtp", "pruned"],
    }


def _task(model: CompactModel) -> str:
    return "image-classification" if model.num_classes else "image-feature-extraction"


def _packed(plan: PruningPlan) -> dict[str, Any]:
    """A plan as JSON without its scores, kept indices as runs: [0, 1, 2, 5] as "0-2 5"."""
    fields = {**plan.to_dict(), "scores": {}}
    fields["kept"] = {name: _runs(kept) for name, kept in plan.kept.items()}
    return fields


def _unpacked(fields: dict[str, Any]) -> PruningPlan:
    """The inverse of `_packed`. Raises PlanError."""
    try:
        kept = {name: _indices(runs) for name, runs in fields["kept"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"plan: kept is missing or no runs of indices ({error})") from error
    return PruningPlan.from_dict({**fields, "kept": kept})


def _runs(indices: tuple[int, ...]) -> str:
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _indices(runs: str) -> list[int]:
    found: list[int] = []
    for run in runs.split():
        first, _, last = run.partition("-")
        if int(last or first) >= MOST_INDICES:
            raise ValueError(f"got {run}, expected less than {MOST_INDICES}")
        found += range(int(first), int(last or first) + 1)
    return found
