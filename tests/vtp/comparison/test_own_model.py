"""vtp.comparison.own_model: branches alone, what is lost in them, and the verdict. No speed is asserted."""

import copy
import dataclasses
import re

import pytest
import torch
from timm.models.eva import Eva

import vtp
from tests.support.models import TINY, build, gated, image, randomize
from vtp.comparison import comparison, own_model
from vtp.comparison.comparison import Budget
from vtp.model.eva import ropes
from vtp.pruning.compact import ConstantBranch

QUICK = Budget(rounds=2, seconds=1.0, warm_up_seconds=0.01)


@pytest.fixture(scope="module", params=["dense keys", "narrow keys"])
def small(request) -> vtp.CompactViT:
    """A compact model; also one whose queries and keys are narrower than the dense model's."""
    model = gated(build(TINY, dtype=torch.float32))
    if request.param == "dense keys":
        return vtp.compact(model, plan()).eval()
    narrow = dataclasses.replace(plan(), keys={"blocks.0.attn": (3, 1, 4), "blocks.1.attn": (2, 2, 2)})
    return vtp.compact(model, narrow, images=image(model, batch=8)).eval()


def plan() -> vtp.PruningPlan:
    return vtp.make_plan(gated(build(TINY, dtype=torch.float32)), rate=0.4)


def record(**milliseconds: float) -> dict:
    """A comparison with one round; a name has `_` for the ": " of a label, and the dtype is left out."""
    runtimes = {
        f"{name.replace('_', ': ')}, float32": {"status": "measured", "seconds": [1e-3 * ms]}
        for name, ms in milliseconds.items()
    }
    return {"macs": {"dense": 300, "compact": 100}, "runtimes": runtimes}


@pytest.mark.parametrize(
    "compact_ms, said",
    [
        (10.0, r"pruning paid: 67% fewer MACs, 3.00x the speed of the dense model$"),
        (15.0, r"pruning paid in part: .* 2.00x the speed .*; 75% of removed MACs became removed time$"),
        (28.0, r"pruning did not pay: 67% fewer MACs, 1.07x the speed .*; MACs fell, time hardly did$"),
        (35.0, r"pruning did not pay: 67% fewer MACs, 0.86x the speed"),
    ],
)
def test_the_verdict_follows_from_the_share_of_macs_that_became_time(compact_ms, said):
    found = own_model.verdict(record(ours=compact_ms, dense_ours=30.0), "ours, float32")
    assert re.search(said, found), found


def test_nothing_is_said_of_what_was_not_measured():
    assert own_model.verdict(record(ours=1.0), "ours, float32") == "ours, float32: not measured"


def test_a_model_that_lost_nothing_is_not_praised():
    unpruned = record(ours=1.0, dense_ours=1.0) | {"macs": {"dense": 5, "compact": 5}}
    assert "nothing was pruned" in own_model.verdict(unpruned, "ours, float32")


def test_branches_together_are_the_blocks(small):
    torch.manual_seed(0)
    tokens = torch.randn(2, TINY.num_tokens, TINY.embed_dim)
    alone = own_model.branches(small)
    assert list(alone) == [f"blocks.{i}.{part}" for i in range(TINY.depth) for part in ("attn", "mlp")]
    with torch.no_grad():
        whole, steps = small.blocks(tokens), tokens
        for blocks, _ in alone.values():
            steps = blocks(steps)
    torch.testing.assert_close(steps, whole)
    inside = small.plan.cost.macs - vtp.model.cost.surroundings_cost(TINY).macs
    assert sum(macs for _, macs in alone.values()) == inside


@pytest.mark.parametrize("rope_type", ["cat", "mixed"])
def test_branches_of_an_eva_are_rotated_and_gated(rope_type):
    torch.manual_seed(0)
    model = Eva(8, 4, 1, 3, embed_dim=24, depth=2, num_heads=2, swiglu_mlp=True, use_rot_pos_emb=True,
                rope_type=rope_type)  # fmt: skip
    randomize(model)
    model = gated(model.eval())
    small = vtp.compact(model, vtp.make_plan(model, rate=0.4)).eval()
    architecture, tokens = small.plan.architecture, torch.randn(2, 5, 24)
    alone = own_model.branches(small)
    with torch.no_grad():
        whole, steps = tokens, tokens
        for block, rope in zip(small.blocks, ropes(small), strict=True):
            whole = block(whole, rope=rope)
        for blocks, _ in alone.values():
            steps = blocks(steps)
            run = own_model.prepare_blocks(blocks, tokens, dtype="float32")
            torch.testing.assert_close(run(), blocks(tokens))
    torch.testing.assert_close(steps, whole)
    inside = small.plan.cost.macs - vtp.model.cost.surroundings_cost(architecture).macs
    assert sum(macs for _, macs in alone.values()) == inside


def test_a_constant_branch_has_no_time_to_lose(small):
    model = copy.deepcopy(small)
    model.blocks[0].mlp = ConstantBranch(TINY.embed_dim)
    assert "blocks.0.mlp" not in own_model.branches(model)


def test_lost_time_is_what_the_share_of_macs_does_not_explain():
    def runtime(ms: float, macs: int) -> dict:
        return {"status": "measured", "seconds": [1e-3 * ms], "macs": macs}

    runtimes = {
        "dense attn": runtime(2.0, 100), "dense mlp": runtime(6.0, 300), "blocks.0.attn": runtime(1.5, 50),
        "blocks.0.mlp": runtime(2.0, 100), "blocks.1.mlp": runtime(5.0, 100),
    }  # fmt: skip
    lost = own_model.lost_milliseconds({"runtimes": runtimes})
    assert list(lost) == ["blocks.1.mlp", "blocks.0.attn", "blocks.0.mlp"]
    assert lost == pytest.approx({"blocks.1.mlp": 3.0, "blocks.0.attn": 0.5, "blocks.0.mlp": 0.0})


def test_every_branch_is_timed_and_the_worst_is_named_with_its_widths(small, monkeypatch):
    monkeypatch.setattr(comparison, "MOST_CALLS", 1)  # of a turn
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = own_model.compare_branches(small, 1, "float32", QUICK)
    torch.set_num_threads(threads)
    assert {p["status"] for p in found["runtimes"].values()} == {"measured"}
    assert {"dense attn", "dense mlp"} <= found["runtimes"].keys()
    header, *rows = own_model.attribution_table(small, found, rows=99)
    assert len(rows) == 2 * TINY.depth
    shown = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    part = small.blocks[0].mlp
    assert (
        shown["blocks.0.mlp"]["widths kept"]
        == f"{part.fc1.in_features} into fc1, {part.fc2.in_features} hidden"
    )
    narrow = small.blocks[1].attn.key_widths != (4, 4, 4)
    assert (", keys 2 2 2" in shown["blocks.1.attn"]["widths kept"]) == narrow
