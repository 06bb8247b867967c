"""Who may import whom: floors of the house, read from the source. An import anywhere in a file counts, also
one inside a function or for type checkers alone."""

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("vtp_kernels", "vtp", "bench")

# From the ground up. A module imports from its own floor and from those below; `vtp/__init__.py` is the roof.
FLOORS = (
    ("vtp_kernels",),
    (
        "vtp.choices",
        "vtp.files",
        "vtp.kinds",
        "vtp.options",
        "vtp.words",
        "vtp.timing",
        "vtp.machine",
        "vtp.group",
    ),
    ("vtp.model",),
    ("vtp.pruning",),
    ("vtp.checkpoint", "vtp.hub", "vtp.hugging_face", "vtp.hugging_face_checkpoints", "vtp.weights"),
    ("vtp.runtime",),
    ("vtp.training",),
    ("vtp.comparison",),
    ("vtp.report",),
    ("vtp.zoo", "vtp.one_shot", "vtp.recipes"),
    ("vtp.run_folder",),
    ("vtp.pipeline",),
    ("vtp.arguments",),
    ("vtp.commands",),
    ("vtp.execution",),
    ("vtp.cli",),
    ("vtp",),
    ("bench",),
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(name: str, source: ast.Module) -> Iterator[str]:
    """Modules of this project that the source of module `name` imports."""
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import, expected the module's whole name"
            # `from package import module` imports the module; `from module import name` its name.
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [each if each in MODULES else node.module for each in full]
        else:
            continue
        for module in found:
            while module and module not in MODULES:
                module = module.rpartition(".")[0]
            if module and module != name:
                yield module


@functools.cache
def tree(name: str) -> ast.Module:
    """The source of a module of this project."""
    return ast.parse(MODULES[name].read_text())


@functools.cache
def graph() -> dict[str, set[str]]:
    """Of each module those that it imports."""
    return {name: set(imported(name, tree(name))) for name in MODULES}


def floor(module: str) -> int:
    """The floor whose name is the longest beginning of the module's."""
    names = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    return next(names[m] for m in _beginnings(module) if m in names)


def _beginnings(module: str) -> Iterator[str]:
    while module:
        yield module
        module = module.rpartition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_runs_upwards(package):
    upwards = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if name.split(".")[0] == package and floor(other) > floor(name)
    ]
    assert upwards == []


def test_there_is_no_circle_of_imports():
    try:
        graphlib.TopologicalSorter(graph()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_nothing_is_imported_by_a_text_or_found_by_a_changed_path():
    hidden = [
        f"{path.relative_to(ROOT)}: {text}"
        for name, path in MODULES.items()
        for text in ("sys.path", "spec_from_file_location", '__import__("vtp', 'import_module("vtp.')
        if text in path.read_text()
    ]
    assert hidden == []


def test_a_name_with_an_underscore_stays_in_its_package():
    """`vtp_kernels` is one package; of `vtp` each folder is."""
    found = []
    for name, path in MODULES.items():
        parts = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        package = ".".join(parts[: 2 if parts[0] == "vtp" else 1])
        for node in ast.walk(tree(name)):
            if not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] not in PACKAGES:
                continue
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            private += [part for part in node.module.split(".") if part.startswith("_")]
            own = node.module == package or node.module.startswith(f"{package}.")
            found += [f"{name}: {each} of {node.module}" for each in private if not own]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import vtp.cli",
        "from vtp import cli",
        "def later():\n    from vtp.cli import main",
        "if TYPE_CHECKING:\n    import vtp.cli",
    ],
)
def test_every_form_of_an_import_is_seen(source):
    assert list(imported("vtp.files", ast.parse(source))) == ["vtp.cli"]
