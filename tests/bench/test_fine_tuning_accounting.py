"""What a step of fine-tuning launches: aligned products alone, few launches more than the dense model."""

import functools

import pytest
import timm
import torch

from bench import fine_tuning_accounting
from bench.fine_tuning_accounting import COMPACT, DENSE, NAME, account, is_aligned
from bench.irregular import cut, gated_model


@functools.cache
def accounts():
    """Of one block of DeiT-B: the dense model's step, and the compact one's on either path."""
    dense = timm.create_model(NAME, depth=1)
    small = cut(gated_model(NAME, depth=1), 0.4)
    return {
        "dense": account(dense, "padded"),
        "padded": account(small, "padded"),
        "narrow": account(small, "narrow"),
    }


def test_padded_a_step_has_at_most_1_3_times_the_launches_of_the_dense_one():
    launches = {name: len(own.records) for name, own in accounts().items()}
    assert launches["dense"] == 52
    assert launches["padded"] <= 1.3 * launches["dense"] < launches["narrow"]


@pytest.mark.parametrize("path", ["padded", "narrow"])
def test_every_product_of_a_step_is_aligned(path):
    own = accounts()[path]
    assert not own.misaligned
    assert sum(record.flops > 0 for record in own.records) >= 3 * 4 + 2


def test_padded_weights_are_formed_in_few_bytes():
    """Beside what activations are: less than the ops' copies of activations take."""
    padded, narrow = accounts()["padded"], accounts()["narrow"]
    forming = ("new_zeros", "index_copy_", "index_select", "copy_")
    assert sum(r.dram_bytes for r in padded.records if r.name in forming) < 0.02 * padded.gigabytes * 1e9
    assert padded.gigabytes < narrow.gigabytes
    assert padded.seconds(COMPACT) < narrow.seconds(COMPACT) < accounts()["dense"].seconds(DENSE)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (torch.empty(16, 24), True),
        (torch.empty(16, 24).t(), True),
        (torch.empty(3, 24), True),  # so many rows of 24
        (torch.empty(16, 21), False),
        (torch.empty(24, 21).t(), False),
        (torch.empty(16, 24)[:, :21], False),
        (torch.empty(16, 24)[:, 1:9], False),
        (torch.empty(16, 24)[:, ::2], False),
        (torch.empty(2, 5, 3, 16).transpose(1, 2), True),
    ],
)
def test_what_is_aligned(matrix, expected):
    assert is_aligned(matrix) == expected


def test_the_command_prints_a_row_for_each_way(capsys):
    assert fine_tuning_accounting.main(["--depth", "1", "--batch", "8"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| the ")]
    assert [row.split("|")[1].strip() for row in rows] == [
        "the dense model", "the compact one on padded widths", "the compact one on the ops",
    ]  # fmt: skip
    assert "not aligned" not in "".join(rows)
