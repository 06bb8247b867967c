"""The plan as a value: what cannot be changed, what its file holds, and which files are refused."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch

import vtp
from tests.support.models import TINY, prepared
from vtp.model.widths import SITES
from vtp.zoo import fashion_deit_architecture


@pytest.fixture(scope="module")
def tiny():
    return prepared(TINY)


@pytest.fixture(scope="module")
def fashion():
    return prepared(fashion_deit_architecture())


@pytest.fixture(scope="module")
def plan(tiny):
    return vtp.make_plan(tiny, rate=0.4)


def test_plan_cannot_be_changed(plan):
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.threshold = 0.0
    for mapping in (plan.kept, plan.scores, plan.budget):
        with pytest.raises(TypeError):
            mapping[next(iter(mapping))] = ()
        with pytest.raises(TypeError):
            del mapping[next(iter(mapping))]
    with pytest.raises(TypeError):
        plan.kept["blocks.0.mlp.fc2"][0] = 7


def test_plan_does_not_follow_the_mapping_it_was_made_from(plan):
    kept = {name: list(indices) for name, indices in plan.kept.items()}
    own = dataclasses.replace(plan, kept=kept)
    kept["blocks.0.attn.qkv"].clear()
    kept.clear()
    assert own == plan
    assert hash(own) == hash(plan)


@pytest.mark.parametrize(
    "round_trip",
    [
        copy.copy,
        copy.deepcopy,
        lambda p: pickle.loads(pickle.dumps(p)),
        lambda p: vtp.PruningPlan.from_dict(p.to_dict()),
    ],
    ids=["copy", "deepcopy", "pickle", "dict"],
)
def test_copies_are_equal_and_hash_alike(plan, round_trip):
    again = round_trip(plan)
    assert again == plan
    assert hash(again) == hash(plan)
    assert {plan: 1}[again] == 1
    assert again.cost == plan.cost


def test_different_plans_differ(tiny, plan):
    other = vtp.make_plan(tiny, rate=0.41)
    assert other != plan
    assert len({plan, other}) == 2


def test_hash_of_equal_plans_is_equal_whatever_the_order_of_their_scores(plan):
    other = dataclasses.replace(plan, scores=dict(reversed(list(plan.scores.items()))))
    assert other == plan
    assert hash(other) == hash(plan)


@pytest.mark.parametrize(
    "settings", [{"rate": 0.4}, {"macs": 12_000, "per_mac": True, "round_to": 2, "min_keep": 1}]
)
def test_json_file_brings_back_an_equal_plan(tiny, tmp_path, settings):
    plan = vtp.make_plan(tiny, **settings)
    plan.save(tmp_path / "plan.json")
    again = vtp.PruningPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert hash(again) == hash(plan)
    assert (again.cost, again.rate, str(again)) == (plan.cost, plan.rate, str(plan))
    assert torch.equal(
        vtp.compact(tiny, again).blocks[1].mlp.fc1.weight, vtp.compact(tiny, plan).blocks[1].mlp.fc1.weight
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_file_is_plain_json_without_nan(plan, tmp_path):
    plan.save(tmp_path / "plan.json")

    def refuse(constant):
        raise AssertionError(constant)

    data = json.loads((tmp_path / "plan.json").read_text(), parse_constant=refuse)
    assert data["plan_version"] == 2
    assert data["kept"]["blocks.0.attn.qkv"] == list(plan.kept["blocks.0.attn.qkv"])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(plan, tmp_path, share):
    file = tmp_path / "plan.json"
    plan.save(file)
    text = file.read_text()
    file.write_text(text[: int(share * len(text))])
    with pytest.raises((vtp.PlanError, vtp.FileError), match=r"plan\.json is .*cut off"):
        vtp.PruningPlan.load(file)


@pytest.mark.parametrize(
    "content",
    [b"{}", b"[]", b"3", b"null", b'{"a": 1}', b"\xff\xfe\x00", b"[" * 100_000, b'{"plan_version": 1}'],
    ids=["object", "list", "number", "null", "other", "binary", "deep", "empty-plan"],
)
def test_foreign_file_is_refused(tmp_path, content):
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(vtp.PlanError, match=r"not a pruning plan|not JSON|missing"):
        vtp.PruningPlan.load(file)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(vtp.FileError, match=r"cannot read .*none\.json: No such file"):
        vtp.PruningPlan.load(tmp_path / "none.json")
    with pytest.raises(vtp.FileError, match="is a folder, expected a pruning plan"):
        vtp.PruningPlan.load(tmp_path)


def test_newer_plan_is_refused_with_both_versions(plan):
    with pytest.raises(vtp.PlanError, match="version 3, expected 2; update vtp"):
        vtp.PruningPlan.from_dict({**plan.to_dict(), "plan_version": 3})


SITE = "blocks.0.mlp.fc1"


@pytest.mark.parametrize(
    "indices",
    [[0, 12], [-1, 3], [3, 2], [3, 3], [0.5, 1.5], ["0", "1"], [None], "ab", 7, None, [[0]], [10**30]],
    ids=str,
)
def test_tampered_indices_are_refused(plan, indices):
    data = json.loads(json.dumps(plan.to_dict()))
    data["kept"][SITE] = indices
    with pytest.raises(vtp.PlanError, match=r"ascending indices|wrong type"):
        vtp.PruningPlan.from_dict(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["kept"].pop(SITE),
        lambda d: d["kept"].update(extra=[0]),
        lambda d: d.update(kept=dict(reversed(d["kept"].items()))),
        lambda d: d["scores"].update({SITE: [1.0]}),
        lambda d: d["scores"].update({SITE: ["a"] * 12}),
        lambda d: d.update(threshold="high"),
        lambda d: d.update(budget="0.4"),
        lambda d: d.update(budget={"rate": "much"}),
        lambda d: d.update(extra=1),
        lambda d: d.pop("parent"),
        lambda d: d.update(architecture=None),
        lambda d: d["architecture"].update(num_heads=0),
        lambda d: d["architecture"].update(num_heads=5),
        lambda d: d["architecture"].update(num_heads="3"),
        lambda d: d["architecture"].update(embed_dim=12.0),
        lambda d: d["architecture"].update(patch_size=[0, 0]),
        lambda d: d["architecture"].update(patch_size=4),
        lambda d: d["architecture"].update(depth=-1),
        lambda d: d["architecture"].update(depth=3),
        lambda d: d["architecture"].update(depth=10**12),
        lambda d: d["architecture"].update(global_pool="best"),
        lambda d: d["architecture"].update(reg_tokens=-2),
        lambda d: d["architecture"].update(unknown=1),
    ],
)
def test_tampered_fields_are_refused(plan, change):
    data = json.loads(json.dumps(plan.to_dict()))
    change(data)
    with pytest.raises(vtp.PlanError):
        vtp.PruningPlan.from_dict(data)


# -- Key widths, turned values, predicted changes ----------------------------------------------------------


def with_keys(plan, **fields):
    keys = {"blocks.0.attn": (1, 4, 3)}
    return dataclasses.replace(plan, keys=keys, value_basis="principal", predicted_change=0.25, **fields)


def test_file_of_version_1_loads_with_the_keys_of_the_dense_model(plan):
    data = json.loads(json.dumps(plan.to_dict()))
    for field in ("keys", "value_basis", "predicted_change"):
        del data[field]
    loaded = vtp.PruningPlan.from_dict(data | {"plan_version": 1})
    assert loaded == plan
    assert dict(loaded.keys) == {f"blocks.{i}.attn": (4, 4, 4) for i in range(2)}
    assert (loaded.value_basis, loaded.predicted_change) == ("dimensions", None)
    assert not loaded.needs_images
    assert loaded.cost == plan.cost


def test_file_of_version_2_brings_back_keys_basis_and_predicted_change(plan, tmp_path):
    narrow = with_keys(plan)
    narrow.save(tmp_path / "plan.json")
    loaded = vtp.PruningPlan.load(tmp_path / "plan.json")
    assert loaded == narrow
    assert loaded != plan
    assert hash(loaded) == hash(narrow)
    assert loaded.keys["blocks.0.attn"] == (1, 4, 3)
    assert loaded.keys["blocks.1.attn"] == (4, 4, 4)
    assert (loaded.value_basis, loaded.predicted_change) == ("principal", 0.25)
    assert copy.deepcopy(narrow) == pickle.loads(pickle.dumps(narrow)) == narrow


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"blocks.2.attn": (4, 4, 4)}, r"keys: got \['blocks.2.attn'\], expected names like 'blocks.0.attn'"),
        ({"blocks.0.attn.qkv": (4, 4, 4)}, r"keys: got .*expected names like"),
        ({"blocks.0.attn": (4, 4)}, r"keys\['blocks.0.attn'\]: got \(4, 4\), expected 3 widths from 1 to 4"),
        ({"blocks.0.attn": (0, 4, 4)}, "expected 3 widths from 1 to 4"),
        ({"blocks.0.attn": (5, 4, 4)}, "expected 3 widths from 1 to 4"),
        ({"blocks.0.attn": (-1, 4, 4)}, "expected 3 widths from 1 to 4"),
        ({"blocks.0.attn": (2.5, 4, 4)}, "fields are missing, unknown or of the wrong type"),
        ({"blocks.0.attn": 4}, "fields are missing, unknown or of the wrong type"),
        ([4, 4, 4], "fields are missing, unknown or of the wrong type"),
    ],
    ids=str,
)
def test_bad_keys_are_refused(plan, keys, message):
    with pytest.raises(vtp.PlanError, match=message):
        vtp.PruningPlan.from_dict({**plan.to_dict(), "keys": keys})


@pytest.mark.parametrize(
    "field", [{"value_basis": "best"}, {"value_basis": None}, {"predicted_change": "much"}]
)
def test_bad_basis_or_change_is_refused(plan, field):
    with pytest.raises(vtp.PlanError):
        vtp.PruningPlan.from_dict({**plan.to_dict(), **field})


def test_norms_of_queries_and_keys_take_all_of_a_head():
    plan = vtp.make_plan(prepared(dataclasses.replace(TINY, qk_norm=True)), rate=0.0)
    with pytest.raises(vtp.PlanError, match="norms of queries and keys are over all of it"):
        dataclasses.replace(plan, keys={"blocks.1.attn": (4, 3, 4)})
    model = prepared(dataclasses.replace(TINY, qk_norm=True))
    with pytest.raises(vtp.PlanError, match=r"^key_width: got 3, expected 4 at most, norms"):
        vtp.make_plan(model, rate=0.4, key_width=3)
    assert not vtp.make_plan(model, rate=0.4, key_width=4).narrows_keys


def test_a_norm_before_proj_takes_values_as_they_are():
    plan = vtp.make_plan(prepared(dataclasses.replace(TINY, scale_attn_norm=True)), rate=0.0)
    with pytest.raises(vtp.PlanError, match="value_basis: got 'principal', expected 'dimensions': the norm"):
        dataclasses.replace(plan, value_basis="principal")


def test_head_that_is_gone_has_no_keys_whatever_they_were(plan):
    kept = dict(plan.kept) | {"blocks.0.attn.proj": (4, 5, 9)}
    narrow = dataclasses.replace(plan, kept=kept, keys={"blocks.0.attn": (1, 4, 4)})
    assert narrow.key_widths(0) == (0, 4, 4)
    assert narrow.block_widths(0).keys == (0, 4, 4)
    assert not narrow.narrows_keys
    assert narrow.cost == dataclasses.replace(narrow, keys={}).cost


def test_narrow_keys_are_cheaper_by_their_products_and_scores(tiny):
    plan = vtp.make_plan(tiny, rate=0.0)
    narrow = with_keys(plan)
    gone, tokens = 3 + 0 + 1, TINY.num_tokens
    assert plan.cost.params - narrow.cost.params == 2 * gone * (12 + 1)
    assert plan.cost.macs - narrow.cost.macs == tokens * 2 * gone * 12 + tokens**2 * gone


def test_printed_plan_shows_key_widths_where_they_are_narrow(plan):
    assert "key and value width of each head" in str(with_keys(plan))
    assert "key" not in str(plan)


def test_printed_plan_shows_every_width_and_what_is_left(fashion):
    plan = vtp.make_plan(fashion, rate=0.4)
    lines = str(plan).splitlines()
    for block in range(6):
        widths = [len(plan.kept[f"blocks.{block}.{site}"]) for site in SITES]
        row = [str(number) for number in (block, *widths, *plan.value_widths(block))]
        assert [line.split() for line in lines].count(row) == 1
    assert any(line.split() == ["dense", "96", "96", "96", "384"] for line in lines)
    for kind in ("params", "macs"):
        share = f"({getattr(plan.cost, kind) / getattr(plan.dense_cost, kind):.1%} left)"
        assert any(share in line for line in lines)
    assert "rate 0.4; score gate, global; 40.0% of dimensions removed" in lines[0]
    assert f"threshold {plan.threshold:.4g}" in lines[1]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_value_widths_have_every_head_also_those_that_are_gone(tiny, gone):
    plan = vtp.make_plan(tiny, rate=0.0)
    width = plan.head_dim
    kept = {"blocks.0.attn.proj": tuple(i for i in range(3 * width) if i // width != gone)}
    plan = dataclasses.replace(plan, kept={**plan.kept, **kept})
    assert plan.value_widths(0) == tuple(0 if head == gone else width for head in range(3))
