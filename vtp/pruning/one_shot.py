"""What `vtp prune --calibrate` and `vtp run --one-shot` share: checks before minutes are spent on images, and
the memory that these take."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from vtp.model.architecture import Architecture
from vtp.pruning.gates import with_gates
from vtp.pruning.plan import PlanError
from vtp.pruning.refit import MOST_IMAGES
from vtp.pruning.scores import OF_STATISTICS
from vtp.pruning.selection import make_plan
from vtp.words import counted


def check_budget(model: nn.Module, budget: Mapping[str, Any], *, calibrated: bool, refitted: bool) -> None:
    """Refuse now what a plan or a cut would refuse later.

    Args:
        model: dense or gated.
        budget: arguments of `make_plan`.
        calibrated: whether there will be statistics; refitted: whether the cut will have images.

    Raises:
        PlanError: an argument is out of range or of no effect, or no plan can meet the budget.
    """
    settings = dict(budget)
    score, scope = settings.pop("score", None), settings.get("scope")
    if not calibrated and (scope == "optimal" or score in OF_STATISTICS):
        name, value = ("scope", scope) if scope == "optimal" else ("score", score)
        raise PlanError(f"{name}: got {value!r}, which takes a calibration on images")
    if settings.get("key_width") is not None and not refitted:
        raise PlanError(f"key_width: got {settings['key_width']!r}, which takes a refit on images")
    if score in ("gate", "taylor") and calibrated:
        make_plan(model, rate=0.0, score=score)
    gated = with_gates(model)
    if scope == "optimal":
        for name in ("key_width", "per_mac"):
            if settings.get(name):
                raise PlanError(f"{name}: got {settings[name]!r}, expected none as scope='optimal' finds it")
        ranges = {name: settings[name] for name in ("round_to", "min_keep") if name in settings}
        make_plan(gated, rate=0.0, **ranges)
        settings |= {"scope": "global", "min_keep": 0}  # it may remove all of a branch whatever min_keep is
    make_plan(gated, **settings)


def check_images(images: int) -> None:
    """Raise ValueError for a number of images that is none, or that a refit does not read."""
    if not 1 <= images <= MOST_IMAGES:
        raise ValueError(f"images: got {images}, expected 1 to {MOST_IMAGES}")


def tokens_size(architecture: Architecture, images: int, memory_gb: float | None) -> str:
    """What the tokens of so many images take in the refit, for the dense and for the cut model, in words."""
    size = 2 * 4e-9 * images * architecture.num_tokens * architecture.embed_dim
    where = "in memory"
    if memory_gb is not None and size > memory_gb:
        where = f"of which {memory_gb:g} GB in memory, the rest in a temporary file"
    return f"{counted(images, 'training image')} of {architecture.num_tokens} tokens: {size:.2g} GB, {where}"
