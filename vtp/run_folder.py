"""The folder of a run: made, kept from other runs, and continued only by the run that it holds."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from vtp.files import FileError, refuse_unwritable, write_atomic
from vtp.group import first_makes, world
from vtp.recipes import STAGES
from vtp.training.data import Data
from vtp.training.identity import settings_that_count
from vtp.training.ranks import begun_by_this_job, note_begun
from vtp.training.run_lock import LOCK, run_lock


def make_run_folder(run_dir: str | Path) -> Path:
    """The folder of a run, made if it is not there. Raises FileError if it is a file or cannot be written."""
    run_dir = Path(run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise FileError(f"run folder: {run_dir} is a file, expected a folder")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"run folder: cannot make {run_dir}: {error.strerror}") from error
    refuse_unwritable(run_dir / "metrics.jsonl")
    return run_dir


@contextmanager
def run_folder(run_dir: str | Path) -> Iterator[Path]:
    """The folder of a run, made if it is not there and kept from other runs: rank 0 has its lock. Where an
    error comes before anything is in it, none is left.

    Raises:
        FileError: it is a file, cannot be written, or another run is in it; on the other ranks RankError.
    """
    run_dir = Path(run_dir)
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        with ExitStack() as held:
            first_makes(world(), lambda: held.enter_context(run_lock(make_run_folder(run_dir))))
            yield run_dir
    except Exception:
        with suppress(OSError):  # there is something in it, or it was never made
            for folder in made:
                folder.rmdir()
        raise


def begin_run(run_dir: Path, wanted: dict[str, Any], resume: bool, data: Data) -> bool:
    """Write down what is asked for, which for a run that is resumed must be what it was begun with. Returns
    whether it is one.

    Args:
        wanted: for config.json; "identity" says what is in the model and the data.
        resume: what was asked for; what the same job has begun is resumed without it.

    Raises:
        FileError: there is another run in the folder, or one that is not to be resumed.
    """
    file, job_has_begun = run_dir / "config.json", f"run {run_dir.resolve()}"
    resume = resume or begun_by_this_job(job_has_begun)
    if file.exists() and not _nothing_trained(run_dir):
        _check_same_run(run_dir, wanted, resume, data)
    write_atomic(file, lambda path: path.write_text(json.dumps(wanted, indent=1)))
    note_begun(job_has_begun)
    return resume


def _nothing_trained(run_dir: Path) -> bool:
    """Whether a run folder has no more in it than a run that failed at once has left: nothing to lose."""
    names, metrics = {path.name for path in run_dir.iterdir()}, run_dir / "metrics.jsonl"
    if not names <= {LOCK, "config.json", "dense.safetensors", metrics.name, "checkpoints", "tensorboard"}:
        return False
    if (metrics.exists() and metrics.stat().st_size) or any((run_dir / "checkpoints").glob("*")):
        return False
    try:
        return "budget" in json.loads((run_dir / "config.json").read_text())  # one of ours
    except (ValueError, TypeError):
        return False


def _check_same_run(run_dir: Path, wanted: dict[str, Any], resume: bool, data: Data) -> None:
    """Raise FileError unless a run is resumed that was begun with what is wanted now."""
    file = run_dir / "config.json"
    if not resume:
        raise FileError(
            f"run folder: {run_dir} holds a run already; continue it with --resume, or name another"
        )
    try:
        found = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise FileError(f"run folder: {file} is damaged ({error}); name another folder") from error
    if not isinstance(found.get("identity"), dict):
        raise FileError(
            f"run folder: {file} does not say what is in the model and the data, as that of an older vtp; it "
            "cannot be resumed: name another folder (the models in this one still load)"
        )
    before, now = (_what_counts(each, run_dir, data) for each in (found, wanted))
    odd = [name for name in now if before.get(name) != now[name]]
    if odd:
        changes = "; ".join(_difference(name, before.get(name), now[name]) for name in odd)
        raise FileError(
            f"run folder: {run_dir} holds a run with another {', '.join(odd)}; it cannot be resumed "
            f"({changes})"
        )


def _difference(name: str, before: Any, now: Any) -> str:
    """What differs in a setting, in words; of several under one name those that do."""
    if isinstance(before, dict) and isinstance(now, dict):
        odd = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return "; ".join(_difference(f"{name}.{key}", before.get(key), now.get(key)) for key in odd)
    return f"{name}: the run has {before!r}, now {now!r}"


def _what_counts(written: dict[str, Any], run_dir: Path, data: Data) -> dict[str, Any]:
    """What must stay the same for a run to be resumed: what is in its model and data, not what they are
    called; of a stage that has not begun no more than the seed, by which images are drawn too. How many
    images an update has, a stage's checkpoint says."""
    # Of files and folders.
    names = {"model", "checkpoint", "data", "data_root", "class_map", "teacher", "teacher_checkpoint"}
    counts = {name: written[name] for name in written.keys() - names - {"identity"}}
    for stage in STAGES:
        if isinstance(settings := counts.get(stage), dict):
            begun = (run_dir / "checkpoints" / f"{stage}.safetensors").exists()
            counts[stage] = settings_that_count(settings, data) if begun else settings.get("seed")
    return counts | written["identity"]
