"""The figures of docs/ are those of the results files, as the commands that docs/ names print them."""

import re
from pathlib import Path

import pytest

from bench import compact_accounting, compare, exports, gating_cost, latency_budget, one_shot
from vtp_kernels.proofs import gating_roofline

DOCS = Path(__file__).parents[2] / "docs"


def rows(text: str) -> set[str]:
    return {re.sub(r"\s+", "", line) for line in text.splitlines() if line.startswith("|")}


@pytest.mark.parametrize(
    "page, commands",
    [
        ("speed-cpu", [compare]),
        ("latency-budgets", [latency_budget]),
        ("training-cost", [gating_cost, gating_roofline, compare]),
        ("gpu-proofs", [compact_accounting]),
        ("one-shot", [one_shot]),
        ("export", [exports]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_row_of_figures_is_printed_by_a_command(page, commands, capsys):
    for command in commands:
        assert command.main(["--markdown"]) == 0
    printed = rows(capsys.readouterr().out)
    text = (DOCS / f"{page}.md").read_text().partition("## Where the price is decided")[0]
    assert rows(text)
    assert rows(text) <= printed
