"""Which tests of a product of parameters the quick lane runs."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.covering import covering

ROOT = Path(__file__).parents[2]
AXES = [list(range(6)), list("abcde"), [None, True], [0.5, 1.5, 2.5]]
PRODUCT = list(itertools.product(*AXES))


def combinations(rows, strength):
    return {c for row in rows for c in itertools.combinations(enumerate(row), strength)}


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_combination_of_so_many_values_is_covered(strength):
    chosen = covering(PRODUCT, strength)
    assert combinations([PRODUCT[i] for i in chosen], strength) == combinations(PRODUCT, strength)


@pytest.mark.parametrize(("strength", "most"), [(1, 6), (2, 36), (3, 110)])
def test_a_subset_is_hardly_larger_than_it_must_be(strength, most):
    """At least the product of the longest axes: 6, 6 x 5 and 6 x 5 x 3."""
    chosen = covering(PRODUCT, strength)
    assert chosen == sorted(set(chosen)) and len(chosen) <= most


def test_only_combinations_that_occur_are_asked_for_and_a_row_of_one_axis_stays():
    rows = [("f32", "a"), ("bf16", "a"), ("bf16", "b")]
    assert covering(rows, 2) == [0, 1, 2]
    assert covering([("a",), ("b",), ("a",)], 2) == [0, 1]
    assert covering([], 2) == []


LANES = """
import pytest

@pytest.fixture(params=["p", "q"])
def path(request):
    return request.param

@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("M", "N"), [(1, 1), (2, 1), (3, 1)])
def test_pairs(M, N, dtype, path):
    pass

@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("M, N", [(1, 1), (2, 1), (3, 1)])
def test_values(M, N, dtype):
    pass

@pytest.mark.covering(None)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("M", [1, 2, 3])
def test_everything(M, dtype, path):
    pass

@pytest.mark.covering(by=lambda word: (len(word), word[0]))
@pytest.mark.parametrize("word", ["aa", "ab", "ba", "a"])
def test_traits(word):
    pass

class TestOwn:
    @pytest.mark.parametrize("M", [1, 2])
    def test_one_axis(self, M):
        pass

@pytest.mark.thorough
def test_marked():
    pass
"""


def collected(folder: Path, *arguments: str) -> list[str]:
    (folder / "test_lanes.py").write_text(LANES)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "tests.support.covering"]
    command += ["-p", "no:cacheprovider", f"--rootdir={folder}", *arguments]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]


def test_the_lanes_of_a_run(tmp_path):
    file = str(tmp_path / "test_lanes.py")
    everything, quick = collected(tmp_path, file), collected(tmp_path, "-m", "not thorough", file)
    counts = {
        name: (
            sum(test.startswith(name) for test in everything),
            sum(test.startswith(name) for test in quick),
        )
        for name in ("test_pairs", "test_values", "test_everything", "test_traits", "TestOwn", "test_marked")
    }
    assert counts == {
        "test_pairs": (12, 6),
        "test_values": (6, 3),
        "test_everything": (12, 12),
        "test_traits": (4, 3),
        "TestOwn": (2, 2),
        "test_marked": (1, 0),
    }
    left_out = min(set(everything) - set(quick) - {"test_marked"})
    assert collected(tmp_path, "-m", "not thorough", f"{file}::{left_out}") == [left_out]
