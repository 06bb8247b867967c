"""Latency tables: what a table predicts, what a latency budget keeps, which tables are used or refused.

Tables are made up, with times that are known for every width; one test measures a toy. No speed is asserted.
"""

import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch

import vtp
from bench import latency_budget
from tests.support.models import AXIAL, build, gated, image
from vtp.files import FileError
from vtp.model.widths import BlockWidths
from vtp.pruning import latency_table
from vtp.pruning.latency_table import (
    Grid,
    LatencyTable,
    LatencyTableError,
    cached_table,
    geometry,
    store_table,
)
from vtp.runtime import latency_profile as profile
from vtp.runtime.latency_profile import monotone, profile_widths, steady_medians
from vtp.zoo import fashion_deit_architecture

TOY = dataclasses.replace(
    fashion_deit_architecture(), img_size=(32, 32), patch_size=(8, 8), embed_dim=24, depth=3, num_heads=3,
    mlp_hidden=40,
)  # fmt: skip
HEAD_DIM = TOY.head_dim
OUTSIDE = 0.25


def attention_ms(qkv, heads, values, keys=HEAD_DIM):
    """Linear in each width alone, as multiply-adds are; so interpolation has no error."""
    return 0.01 + 1e-4 * qkv * heads * (2 * keys + values) + 3e-3 * heads * (keys + values)


def mlp_ms(fc1, fc2):
    return 0.02 + 2e-4 * fc1 * fc2 + 3e-3 * fc2


def made_up(architecture=TOY, **changes):
    width, heads, hidden = architecture.embed_dim, architecture.num_heads, architecture.mlp_hidden
    axes = {
        attention_ms: (
            (1, width // 2, width), (1, heads), (1, 3, architecture.head_dim), (1, architecture.head_dim)
        ),
        mlp_ms: ((1, width), (1, hidden // 4, hidden)),
    }  # fmt: skip
    grids = [Grid(a, tuple(itertools.starmap(ms, itertools.product(*a)))) for ms, a in axes.items()]
    fields = {
        "geometry": latency_table.geometry(architecture), "machine": latency_table.machine(),
        "batch_size": 1, "dtype": "float32", "engine": "made up", "outside_ms": OUTSIDE,
        "attention": grids[0], "mlp": grids[1], "rounds": 7, "date": "2026-11-23",
    }  # fmt: skip
    return LatencyTable(**fields | changes)


def block_ms(qkv, values, fc1, fc2, keys):
    """What a block takes, from the formulas; each head has its own widths."""
    alive, ms = [widths for widths in zip(values, keys, strict=True) if widths[0]], 0.0
    if qkv and alive:
        ms += sum(attention_ms(qkv, len(alive), *widths) for widths in alive) / len(alive)
    return ms + (mlp_ms(fc1, fc2) if fc1 and fc2 else 0.0)


def plan_ms(plan):
    total = OUTSIDE
    for i in range(plan.architecture.depth):
        qkv, fc1, fc2 = (len(plan.kept[f"blocks.{i}.{s}"]) for s in ("attn.qkv", "mlp.fc1", "mlp.fc2"))
        total += block_ms(qkv, plan.value_widths(i), fc1, fc2, plan.key_widths(i))
    return total


@pytest.fixture(scope="module")
def table():
    return made_up()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return gated(TOY.build(), seed=3)


@pytest.fixture(scope="module")
def dense():
    return build(dataclasses.replace(TOY, depth=1), torch.float32)


@pytest.fixture(scope="module")
def statistics(dense):
    return vtp.calibrate(dense, image(dense, batch=48))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test reads or writes the user's own cache."""
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def one_thread():
    """A toy gains nothing from threads, and on a busy machine waits for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ prediction


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.8, 0.95])
def test_prediction_is_the_sum_of_what_its_widths_take(model, table, rate):
    plan = vtp.make_plan(model, rate=rate, min_keep=0)
    assert table.predict(plan) == pytest.approx(plan_ms(plan), abs=1e-6 * TOY.depth)


def test_compact_model_is_predicted_as_its_plan(model, table):
    plan = vtp.make_plan(model, rate=0.4)
    assert table.predict(vtp.compact(model, plan)) == table.predict(plan)


def test_grid_is_interpolated_along_each_axis_between_measured_widths():
    grid = Grid(((1, 3, 7), (1, 5)), (1.0, 3.0, 5.0, 6.0, 5.0, 10.0))
    assert grid.mean(3, 5) == 6
    assert grid.mean(2, 1) == 3
    assert grid.mean(5, 3) == pytest.approx((5.5 + 7.5) / 2)
    assert grid.mean(3, [1, 5]) == 5.5
    assert grid.mean([3, 7, 2], [1, 1, 5]) == pytest.approx((5 + 5 + 4.5) / 3)


def test_unequal_heads_take_the_mean_of_what_equal_ones_take():
    # More than linear in the width of a head: the mean of times, not the time of the mean.
    grid = Grid(((1, 24), (1, 3), (1, 4, 8), (1, 8)), (1.0, 1.0, 2.0, 2.0, 9.0, 9.0) * 4)
    table = made_up(attention=grid)
    assert table.block_nanoseconds(BlockWidths(24, (8, 4, 1))) == 4_000_000
    assert table.block_nanoseconds(BlockWidths(24, (4, 4, 4))) == 2_000_000


def test_head_takes_the_time_of_its_own_keys_and_values(table):
    def ms(values, keys):
        return 1e-6 * table.block_nanoseconds(BlockWidths(24, values, keys=keys))

    # Of both widths together: at half of the values, keys matter half as much here.
    grid = Grid(((1, 24), (1, 3), (1, 8), (1, 8)), (0.0, 0.0, 0.0, 49.0) * 4)
    product = made_up(attention=grid)
    for values, keys in (((8, 3, 1), (8, 2, 5)), ((8, 0, 5), (3, 0, 8)), ((0, 0, 8), (8, 8, 1))):
        alive = [(v - 1) * (k - 1) for v, k in zip(values, keys, strict=True) if v]
        expected = 1e6 * sum(alive) / len(alive)
        assert product.block_nanoseconds(BlockWidths(24, values, keys=keys)) == pytest.approx(expected, abs=1)
    assert ms((8, 8, 8), (1, 1, 1)) == pytest.approx(attention_ms(24, 3, 8, 1), abs=1e-6)  # a node
    assert ms((8, 8, 8), (5, 5, 5)) == pytest.approx(attention_ms(24, 3, 8, 5), abs=1e-6)  # between two
    assert ms((8, 4, 4), (5, 8, 8)) == pytest.approx(ms((4, 8, 4), (8, 5, 8)), abs=1e-6)
    assert ms((8, 4, 0), ()) == ms((8, 4, 0), (8, 8, 0)) == ms((8, 4, 0), (8, 8, 3))


@pytest.mark.parametrize(
    ("widths", "ms"),
    [
        ((24, [0, 0, 0], 24, 40), mlp_ms(24, 40)),
        ((0, [8, 8, 8], 24, 40), mlp_ms(24, 40)),
        ((24, [8, 8, 8], 0, 40), attention_ms(24, 3, 8)),
        ((24, [8, 8, 8], 24, 0), attention_ms(24, 3, 8)),
        ((24, [0, 8, 0], 0, 0), attention_ms(24, 1, 8)),
        ((0, [0, 0, 0], 0, 0), 0.0),
    ],
    ids=["no values", "no inputs of qkv", "no inputs of fc1", "no hidden", "one head", "nothing"],
)
def test_dead_heads_branches_and_blocks_take_no_time(table, widths, ms):
    assert table.block_nanoseconds(BlockWidths(*widths)) == pytest.approx(1e6 * ms, abs=1)


def test_wider_never_takes_less(table):
    rng = np.random.default_rng(0)
    for _ in range(200):
        widths = rng.integers(1, [25, 9, 9, 9, 25, 41, 9, 9, 9])
        wider = np.minimum(widths + rng.integers(0, 3, 9), [24, 8, 8, 8, 24, 40, 8, 8, 8])
        times = [
            table.block_nanoseconds(
                BlockWidths(w[0], tuple(w[1:4].tolist()), w[4], w[5], tuple(w[6:].tolist()))
            )
            for w in (widths, wider)
        ]
        assert times[0] <= times[1]


def test_table_serves_a_model_of_another_depth_and_no_other_geometry(table, model):
    deeper = dataclasses.replace(TOY, depth=5)
    plan = vtp.make_plan(gated(deeper.build()), rate=0.3)
    assert table.predict(plan) == pytest.approx(plan_ms(plan), abs=1e-5)
    wider = dataclasses.replace(TOY, mlp_hidden=48)
    with pytest.raises(LatencyTableError, match="mlp_hidden 40, the model has 48"):
        table.predict(vtp.make_plan(gated(wider.build()), rate=0.3))
    rotary = dataclasses.replace(TOY, eva=AXIAL)
    with pytest.raises(LatencyTableError, match="rotary None, the model has dinov3"):
        table.predict(vtp.make_plan(gated(rotary.build()), rate=0.3))
    with pytest.raises(LatencyTableError, match="glu None, the model has True"):
        table.predict(vtp.make_plan(gated(dataclasses.replace(TOY, glu=True).build()), rate=0.3))
    of_glu = made_up(dataclasses.replace(TOY, glu=True))
    with pytest.raises(LatencyTableError, match="glu True, the model has None"):
        of_glu.predict(plan)


# -------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("options", [{}, {"min_keep": 0}, {"per_mac": True}, {"scope": "per_layer"}], ids=str)
def test_budget_is_met_closely_and_never_exceeded(model, table, share, options):
    budget = share * table.predict(vtp.make_plan(model, rate=0.0))
    plan = vtp.make_plan(model, latency_ms=budget, latency_table=table, **options)
    assert dict(plan.budget) == {"latency_ms": budget}
    # One more of the dimensions that a budget gives back, an input or a hidden one, is 0.2 ms at most here.
    assert 0.97 * budget < table.predict(plan) <= budget


def test_budget_that_the_dense_model_meets_removes_nothing(model, table):
    dense = vtp.make_plan(model, rate=0.0)
    for budget in (table.predict(dense), 2 * table.predict(dense)):
        assert vtp.make_plan(model, latency_ms=budget, latency_table=table).kept == dense.kept


def test_prediction_of_a_plan_is_a_budget_that_the_plan_meets(model, table):
    for rate in (0.1, 0.33, 0.62):
        plan = vtp.make_plan(model, rate=rate)
        again = vtp.make_plan(model, latency_ms=table.predict(plan), latency_table=table)
        assert table.predict(again) == table.predict(plan)


def test_smaller_budget_is_faster(model, table):
    times = [
        table.predict(vtp.make_plan(model, latency_ms=ms, latency_table=table)) for ms in (0.7, 1.0, 1.4)
    ]
    assert times == sorted(times) and times[0] < times[-1]


def test_budget_that_cannot_be_met_is_refused_with_the_least_possible(model, table):
    with pytest.raises(vtp.PlanError, match=r"^latency_ms: 0.01 cannot be met: ([\d.]+) ms remain") as error:
        vtp.make_plan(model, latency_ms=0.01, latency_table=table, min_keep=0.5)
    least = float(re.search(r"met: ([\d.]+) ms", str(error.value))[1])
    with pytest.raises(vtp.PlanError):
        vtp.make_plan(model, latency_ms=0.999 * least, latency_table=table, min_keep=0.5)
    vtp.make_plan(model, latency_ms=1.001 * least, latency_table=table, min_keep=0.5)


def test_narrow_keys_leave_more_of_a_latency_budget_to_the_rest(model, table):
    budget = 0.6 * table.predict(vtp.make_plan(model, rate=0.0))
    wide = vtp.make_plan(model, latency_ms=budget, latency_table=table)
    narrow = vtp.make_plan(model, latency_ms=budget, latency_table=table, key_width=0.25)
    assert narrow.rate < wide.rate and narrow.narrows_keys
    assert table.predict(narrow) == pytest.approx(plan_ms(narrow), abs=1e-5)
    assert 0.97 * budget < table.predict(narrow) <= budget


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_optimal_plan_narrows_keys_where_the_table_says_it_is_faster(dense, statistics, table, share):
    whole = plan_ms(vtp.make_plan(dense, rate=0.0, statistics=statistics))
    options = {"statistics": statistics, "scope": "optimal", "min_keep": 0.0}
    plan = vtp.make_plan(dense, latency_ms=share * whole, latency_table=table, **options)
    assert plan.narrows_keys
    assert table.predict(plan) <= share * whole
    assert table.predict(plan) == pytest.approx(plan_ms(plan), abs=1e-5)
    # Where keys cost nothing all are kept, at the price of what else is cut.
    axes = table.attention.axes
    unaware = made_up(
        attention=Grid(axes, tuple(attention_ms(*widths[:3]) for widths in itertools.product(*axes)))
    )
    wide = vtp.make_plan(dense, latency_ms=share * whole, latency_table=unaware, **options)
    assert not wide.narrows_keys
    assert plan.predicted_change < wide.predicted_change


def test_prediction_of_an_optimal_plan_is_a_budget_that_it_meets(dense, statistics, table):
    options = {"latency_table": table, "statistics": statistics, "scope": "optimal"}
    plan = vtp.make_plan(dense, latency_ms=0.9, **options)
    again = vtp.make_plan(dense, latency_ms=table.predict(plan), **options)
    assert table.predict(again) <= table.predict(plan) <= 0.9


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "12", True], ids=str)
def test_latency_that_is_no_number_is_refused(model, table, value):
    with pytest.raises(vtp.PlanError, match=r"latency_ms: got .* expected a positive number"):
        vtp.make_plan(model, latency_ms=value, latency_table=table)


def test_latency_is_one_of_four_budgets_and_the_table_belongs_to_it(model, table):
    with pytest.raises(
        vtp.PlanError, match=r"latency_ms: got \['latency_ms', 'rate'\], expected exactly one"
    ):
        vtp.make_plan(model, rate=0.4, latency_ms=1.0)
    with pytest.raises(vtp.PlanError, match=r"latency_table: got one without latency_ms"):
        vtp.make_plan(model, rate=0.4, latency_table=table)


def test_table_of_another_model_is_refused(model):
    other = made_up(dataclasses.replace(TOY, embed_dim=48))
    with pytest.raises(vtp.PlanError, match=r"latency_table: .*embed_dim 48, the model has 24"):
        vtp.make_plan(model, latency_ms=1.0, latency_table=other)


def test_plan_of_a_latency_budget_is_saved_and_read_and_says_its_budget(model, table, tmp_path):
    plan = vtp.make_plan(model, latency_ms=0.9, latency_table=table)
    plan.save(tmp_path / "plan.json")
    assert vtp.PruningPlan.load(tmp_path / "plan.json") == plan
    assert "latency_ms 0.9" in str(plan)


# ---------------------------------------------------------------------------------------------------- cache


def test_cached_table_is_used_without_being_named(model, table):
    assert cached_table(TOY) is None
    store_table(table)
    assert cached_table(TOY) == table
    plan = vtp.make_plan(model, latency_ms=0.9)
    assert plan == vtp.make_plan(model, latency_ms=0.9, latency_table=table)


def test_without_a_table_the_error_says_how_to_make_one(model):
    with pytest.raises(vtp.PlanError) as error:
        vtp.make_plan(model, latency_ms=0.9)
    assert "`vtp bench MODEL --profile-widths`" in str(error.value)
    assert "vtp.profile_widths" in str(error.value)


@pytest.mark.parametrize("changed", ["cpu", "flags", "cores", "threads", "instruction_set", "torch", "vtp"])
def test_table_of_another_machine_or_version_is_not_used(table, monkeypatch, changed):
    store_table(table)
    elsewhere = latency_table.machine() | {changed: "another"}
    monkeypatch.setattr(latency_table, "machine", lambda: elsewhere)
    assert cached_table(TOY) is None


def test_table_of_other_threads_is_not_used(table):
    store_table(table)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert cached_table(TOY) is None
    finally:
        torch.set_num_threads(threads)
    assert cached_table(TOY) == table


def test_table_of_another_batch_dtype_or_geometry_is_not_used(table):
    store_table(table)
    assert cached_table(TOY, batch_size=2) is None
    assert cached_table(TOY, dtype=torch.bfloat16) is None
    assert cached_table(dataclasses.replace(TOY, num_classes=11)) is None
    assert cached_table(dataclasses.replace(TOY, depth=9)) == table


def test_file_in_the_cache_that_is_damaged_or_of_another_key_counts_as_none_and_is_replaced(table):
    file = store_table(table)
    file.write_text(file.read_text()[:-100])
    assert cached_table(TOY) is None
    made_up(machine=dict(table.machine) | {"cpu": "another"}).save(file)
    assert cached_table(TOY) is None
    assert store_table(table) == file
    assert cached_table(TOY) == table


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"VTP_CACHE": "{}/own", "XDG_CACHE_HOME": "{}/xdg"}, "own"),
        ({"XDG_CACHE_HOME": "{}/xdg"}, "xdg/vtp"),
        ({"XDG_CACHE_HOME": ""}, ".cache/vtp"),
    ],
    ids=["own", "xdg", "home"],
)
def test_cache_is_where_the_environment_says(table, tmp_path, monkeypatch, variables, folder):
    monkeypatch.delenv("VTP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert store_table(table).parent == tmp_path / folder / "latency"


def test_cache_that_cannot_be_written_is_said(table, cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(FileError, match="cache: cannot make"):
        store_table(table)
    assert cached_table(TOY) is None


# ---------------------------------------------------------------------------------------------------- files


def test_file_gives_back_the_table(table, tmp_path):
    table.save(tmp_path / "table.json")
    loaded = LatencyTable.load(tmp_path / "table.json")
    assert loaded == table
    widths = BlockWidths(13, (5, 0, 7), 17, 31, (2, 0, 8))
    assert loaded.block_nanoseconds(widths) == table.block_nanoseconds(widths)


def test_failed_write_leaves_the_old_file(table, tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    table.save(file)
    before = file.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(FileError, match="No space left"):
        made_up(outside_ms=9.0).save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.glob(".table*")) == []


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileError, match=r"cannot read .*absent\.json"):
        LatencyTable.load(tmp_path / "absent.json")


def without_keys(grid):
    """The grid as JSON data, with keys at full width only and no axis for them, as in version 1."""
    return {"axes": grid["axes"][:-1], "ms": grid["ms"][1::2]}


DAMAGE = {
    "not a table": lambda d: [],
    "no version": lambda d: d.pop("latency_table_version"),
    "newer": lambda d: d.update(latency_table_version=3),
    "no grid": lambda d: d.pop("mlp"),
    "unknown field": lambda d: d.update(colour="red"),
    "too few times": lambda d: d["mlp"]["ms"].pop(),
    "negative time": lambda d: d["mlp"]["ms"].__setitem__(0, -1.0),
    "text as time": lambda d: d["attention"]["ms"].__setitem__(0, "fast"),
    "descending axis": lambda d: d["attention"]["axes"][0].reverse(),
    "axis that ends early": lambda d: d["mlp"]["axes"][1].__setitem__(-1, 39),
    "keys that end early": lambda d: d["attention"]["axes"][3].__setitem__(-1, HEAD_DIM - 1),
    "keys that begin late": lambda d: d["attention"]["axes"][3].__setitem__(0, 2),
    "width of 0": lambda d: d["attention"]["axes"][3].__setitem__(0, 0),
    "no keys": lambda d: d.update(attention=without_keys(d["attention"])),
    "dtype": lambda d: d.update(dtype="int8"),
    "outside": lambda d: d.update(outside_ms=None),
    "geometry": lambda d: d["geometry"].pop("num_heads"),
    "no geometry": lambda d: d.update(geometry=None),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_or_foreign_file_is_refused_by_name(table, tmp_path, damage):
    data = json.loads(json.dumps(table.to_dict()))
    data = [] if damage(data) == [] else data
    (tmp_path / "table.json").write_text(json.dumps(data))
    with pytest.raises(FileError, match=r"table\.json"):
        LatencyTable.load(tmp_path / "table.json")


def test_table_that_was_measured_without_narrow_keys_is_refused_and_the_message_says_what_to_do(table, model):
    data = json.loads(json.dumps(table.to_dict()))
    data |= {"latency_table_version": 1, "attention": without_keys(data["attention"])}
    with pytest.raises(LatencyTableError, match=r"version 1, expected 2; `vtp bench MODEL --profile-widths`"):
        LatencyTable.from_dict(data)
    store_table(table).write_text(json.dumps(data))
    with pytest.raises(vtp.PlanError, match=r"no latency table .* `vtp bench MODEL --profile-widths`"):
        vtp.make_plan(model, latency_ms=1.0)


def test_file_that_is_cut_off_is_refused_by_name(table, tmp_path):
    file = tmp_path / "table.json"
    table.save(file)
    file.write_text(file.read_text()[:-100])
    with pytest.raises(FileError, match=r"table\.json is not JSON, or it is cut off"):
        LatencyTable.load(file)


# ---------------------------------------------------------------------------------------------- measurement


def test_slow_rounds_do_not_change_what_points_take():
    usual, slowness = np.array([1.0, 5.0, 0.2]), np.array([1, 1, 3, 1, 1.5, 1, 1, 2])
    times = usual[:, None] * slowness
    times[1, 4] *= 40  # something else ran just then
    np.testing.assert_allclose(steady_medians(times.tolist()), usual)


def test_point_that_only_had_turns_in_slow_rounds_is_not_slower_than_the_others():
    # Each point is far off in some round of its own; the median of its own times would be as well.
    slowness = np.linspace(1, 2, 9)
    assert steady_medians([slowness.tolist(), (3 * slowness).tolist()]) == pytest.approx([1.5, 4.5])


def test_noise_that_makes_a_wider_one_faster_is_evened_out():
    times = np.array([[1.0, 3.0, 2.8], [2.0, 2.5, 4.0]])
    smooth = monotone(times)
    assert (np.diff(smooth, axis=0) >= 0).all() and (np.diff(smooth, axis=1) >= 0).all()
    assert np.abs(smooth - times).max() <= 0.5
    rising = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert (monotone(rising) == rising).all()


def test_measured_widths_have_the_mean_of_the_grid_and_stay_within_the_model():
    for width, number in itertools.product((1, 2, 5, 37, 39, 40), (1, 2, 3, 12)):
        around = profile._around(width, 8, 40, number)
        assert len(around) == number and min(around) >= 1 and max(around) <= 40
        assert sum(around) == pytest.approx(number * width, abs=number / 2)
    assert profile._around(40, 8, 40, 3) == [40, 40, 40]


def test_what_narrow_keys_save_between_measured_widths_is_interpolated():
    axes = ((1, 12, 24), (1, 2, 3), (1, 4, 8), (1, 8))
    measured = profile._measured(axes)
    assert len(measured) == len(set(measured)) == 27 + 8
    times = profile.completed(axes, {widths: attention_ms(*widths) for widths in measured})
    expected = [attention_ms(*widths) for widths in itertools.product(*axes)]
    np.testing.assert_allclose(times.ravel(), expected, rtol=1e-12)


def test_noise_that_makes_narrow_keys_slower_saves_nothing_and_no_time_is_negative():
    axes = ((1, 2), (1,), (1, 3, 8), (1, 8))
    ms = {widths: 1.0 if widths[-1] == 8 else 1.5 for widths in profile._measured(axes)}
    assert (monotone(profile.completed(axes, ms)) >= 1.0).all()
    ms |= {(1, 1, 3, 8): 0.1, **{widths: 0.0 for widths in ms if widths[-1] == 1}}
    times = monotone(profile.completed(axes, ms))
    assert (times >= 0).all() and (np.diff(times, axis=3) >= 0).all()


@pytest.mark.parametrize("why", [{"qk_norm": True}, {"eva": AXIAL}], ids=["norms", "rotary"])
def test_keys_that_keep_their_width_are_measured_and_read_at_it_only(table, why):
    normed = dataclasses.replace(TOY, **why)
    axes = profile._axes(normed)["attention"]
    assert axes[3] == (8,) and profile._measured(axes) == list(itertools.product(*axes))
    times = profile.completed(axes, {widths: attention_ms(*widths) for widths in itertools.product(*axes)})
    grid = Grid(axes, tuple(times.ravel().tolist()))
    of_normed = made_up(normed, attention=grid)
    for widths in (BlockWidths(24, (8, 3, 0), keys=(8, 8, 0)), BlockWidths(7, (8, 3, 1))):
        assert of_normed.block_nanoseconds(widths) == table.block_nanoseconds(widths)
    with pytest.raises(LatencyTableError, match=r"attention\.axes: got .*\(8, 8\)\], expected .*\(1, 8\)\]"):
        made_up(attention=grid)
    with pytest.raises(LatencyTableError, match=r"attention\.axes: got .*\(1, 8\)\], expected .*\(8, 8\)\]"):
        made_up(normed)


def test_measured_models_have_the_keys_of_their_point():
    generator = torch.Generator().manual_seed(0)
    blocks = profile._attention_blocks(TOY, 24, 2, 8, 5, torch.float32)
    assert len(blocks) > 1 and len({block.keys for block in blocks}) > 1
    assert sum(sum(block.keys) for block in blocks) == 5 * 2 * len(blocks)
    plan = profile._plan(dataclasses.replace(TOY, depth=len(blocks)), blocks, generator)
    assert [plan.key_widths(i) for i in range(len(blocks))] == [(*block.keys, 0) for block in blocks]


def test_measured_models_gather_behind_the_norms_inside_their_branches():
    normed = dataclasses.replace(TOY, scale_attn_norm=True, scale_mlp_norm=True, glu=True, depth=2)
    generator = torch.Generator().manual_seed(0)
    blocks = [BlockWidths(24, (8, 3), 24, 17, (8, 8)), BlockWidths(7, (1,), 5, 4, (8,))]
    fast = profile._random_model(normed, blocks, torch.float32, generator)
    assert fast(torch.zeros(1, normed.in_chans, *normed.img_size)).isfinite().all()
    assert geometry(normed) == geometry(TOY) | dict.fromkeys(
        ("glu", "scale_attn_norm", "scale_mlp_norm"), True
    )


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_prediction_of_an_optimal_plan_is_met_where_proj_and_fc2_gather(share):
    normed = dataclasses.replace(TOY, scale_attn_norm=True, scale_mlp_norm=True)
    model = build(normed, torch.float32)
    statistics = vtp.calibrate(model, image(model, batch=20))
    table = made_up(normed)
    most = share * table.predict(vtp.make_plan(vtp.insert_gates(model), rate=0.0))
    for scope in ("optimal", "global"):
        plan = vtp.make_plan(
            model, latency_ms=most, latency_table=table, statistics=statistics, scope=scope, min_keep=0
        )
        assert table.predict(plan) <= most


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": True}, "batch_size: got True"),
        ({"dtype": torch.float64}, "dtype: got torch.float64"),
    ],
    ids=str,
)
def test_profile_refuses_bad_arguments(changes, message):
    with pytest.raises(LatencyTableError, match=message):
        profile_widths(TOY, **changes)


def test_profile_of_a_toy_makes_a_table_that_a_budget_can_use(one_thread, tmp_path):
    toy = dataclasses.replace(
        fashion_deit_architecture(), img_size=(32, 32), patch_size=(4, 4), embed_dim=96, depth=1, num_heads=3,
        mlp_hidden=384,
    )  # fmt: skip
    shares, random_state = [], torch.get_rng_state()
    table = profile_widths(toy, seconds=0.2, progress=shares.append)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert table.rounds >= 5 and table.machine["threads"] == 1
    assert table.engine == vtp.optimize(vtp.compact(*_dense(toy))).engine
    store_table(table)
    assert cached_table(toy) == table
    model, dense = _dense(toy)
    whole = table.predict(dense)
    assert whole > table.outside_ms > 0
    assert table.predict(vtp.make_plan(model, rate=0.9)) < whole
    budget = (whole + table.outside_ms) / 2
    plan = vtp.make_plan(model, latency_ms=budget, min_keep=0)  # dead branches meet it, whatever the noise
    assert table.predict(plan) <= budget
    assert len(vtp.compact(model, plan)(torch.zeros(1, toy.in_chans, 32, 32))) == 1


def _dense(architecture):
    model = gated(architecture.build(), seed=5)
    return model, vtp.make_plan(model, rate=0.0)


# --------------------------------------------------------------------------------- bench/latency_budget.py


@pytest.mark.thorough
def test_script_compares_prediction_and_measurement(table, model, tmp_path, capsys, one_thread):
    store_table(made_up())  # of one thread
    out = tmp_path / "results.json"
    arguments = ["--cached", "--rounds", "5", "--seconds", "0.1", "--threads", "1", "--out", str(out)]
    assert latency_budget.main([*arguments, "--shares", "0.8", "0.6"], lambda name: model) == 0
    results = json.loads(out.read_text())
    assert [case["model"] for case in results["cases"]] == ["dense", "80%", "60%"]
    whole = table.predict(vtp.make_plan(model, rate=0.0))
    measured_again = LatencyTable.from_dict(results["second_table"])
    assert measured_again.rounds == 5 and measured_again.engine != table.engine
    for case, share in zip(results["cases"], (1, 0.8, 0.6), strict=True):
        if share < 1:
            assert case["budget_ms"] == pytest.approx(share * whole)
        plan = (
            vtp.make_plan(model, rate=0.0)
            if share == 1
            else vtp.make_plan(model, latency_ms=share * whole, latency_table=table)
        )
        assert case["predicted_ms"] == pytest.approx(measured_again.predict(plan))
        assert len(case["seconds"]) == results["rounds"] == 5
        median = 1e3 * sorted(case["seconds"])[2]
        assert case["median_ms"] == pytest.approx(median)
        assert case["error"] == pytest.approx(case["predicted_ms"] / median - 1)
        of_dense = sorted(a / b for a, b in zip(case["seconds"], results["cases"][0]["seconds"], strict=True))
        assert case["of_dense"]["median"] == pytest.approx(of_dense[2])
    printed = capsys.readouterr().out
    assert latency_budget.main(["--markdown", "--out", str(out)]) == 0
    assert capsys.readouterr().out == printed
    assert printed.count("\n| ") == 3 and "deit_small_patch16_224, batch 1, float32" in printed


@pytest.mark.parametrize("table", ["x", 1, {}, []])
def test_what_is_no_table_is_refused(model, table):
    with pytest.raises(vtp.PlanError, match=r"latency_table: got .*, expected a LatencyTable"):
        vtp.make_plan(model, latency_ms=1.0, latency_table=table)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_measurement_that_would_not_end_is_refused(seconds):
    with pytest.raises(LatencyTableError, match=r"seconds: got .*, expected a positive number"):
        profile_widths(TOY, seconds=seconds)


@pytest.mark.parametrize(
    "changed", [{"rounds": "x"}, {"rounds": -3}, {"batch_size": None}, {"engine": None}, {"date": 3}]
)
def test_fields_of_another_type_are_refused(table, changed):
    with pytest.raises(LatencyTableError, match=f"{next(iter(changed))}: got"):
        LatencyTable.from_dict(table.to_dict() | changed)
