"""The cut with images: exact where nothing is lost, never worse where something is; what it leaves alone."""

import copy
import dataclasses
import os
import tempfile

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import vtp
from tests.support.models import FAMILIES, TINY, build, gated, image, relative_error, with_zeros
from tests.support.numerics import assert_close_to_float64
from vtp.pruning import refit as refit_module
from vtp.pruning.compact import ConstantBranch
from vtp.pruning.dense_block import fast_layers, hidden_rows, linear
from vtp.pruning.streams import Store


def plan_of(model, keep=None, keys=None, **fields):
    """A plan that keeps everything but at the sites of `keep`."""
    plan = vtp.make_plan(vtp.insert_gates(model), rate=0.0)
    kept = dict(plan.kept) | {name: tuple(indices) for name, indices in (keep or {}).items()}
    return dataclasses.replace(plan, kept=kept, keys=keys or {}, **fields)


def half_plan(model, **fields):
    """Half of the inputs of each site, none of the heads."""
    keep = {
        name: [j for j in range(width) if j % 2 == 0]
        for name, width in vtp.describe(model).site_widths().items()
    }
    return plan_of(model, keep, **fields)


def narrow(model, width):
    architecture = vtp.describe(model)
    return {f"blocks.{i}.attn": (width,) * architecture.num_heads for i in range(architecture.depth)}


def outputs(model, images):
    with torch.no_grad():
        return model(images)


# -- Where nothing is lost ---------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("basis", ["dimensions", "principal"])
def test_everything_kept_is_the_dense_model(family, basis):
    model = build(FAMILIES[family])
    if FAMILIES[family].scale_attn_norm:
        basis = "dimensions"
    small = vtp.compact(model, plan_of(model, value_basis=basis), images=image(model, batch=30))
    other = image(model, batch=5, seed=9)
    assert relative_error(outputs(small, other), outputs(model, other)) <= 1e-9


def test_gates_are_a_part_of_what_is_learnt_from():
    model = gated(build())
    plan = vtp.make_plan(model, rate=0.0)
    small = vtp.compact(model, plan, images=image(model, batch=30))
    other = image(model, batch=5, seed=9)
    assert relative_error(outputs(small, other), outputs(model, other)) <= 1e-9


def redundant(family="plain"):
    """A model in which half of the inputs of fc2, and of each head's queries, keys and values, say nothing
    that the others do not."""
    model = build(FAMILIES[family])
    generator = torch.Generator().manual_seed(7)

    def mix(rows, columns):
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64) / columns**0.5

    for block in model.blocks:
        fc1 = block.mlp.fc1
        fc1.weight.data[10:], fc1.bias.data[10:] = fc1.weight.data[:10], fc1.bias.data[:10]
        for part in range(3):
            for head in range(3):
                rows = slice(12 * part + 4 * head, 12 * part + 4 * head + 4)
                low = mix(4, 2)
                block.attn.qkv.weight.data[rows] = low @ block.attn.qkv.weight.data[rows][:2]
                block.attn.qkv.bias.data[rows] = low @ block.attn.qkv.bias.data[rows][:2]
    return model


@pytest.mark.parametrize(
    "family",
    [
        *("distilled", "layer-scale"),
        *(pytest.param(name, marks=pytest.mark.thorough) for name in ("plain", "registers", "average-pool")),
    ],
)
def test_what_is_said_twice_is_recovered_after_the_cut(family, monkeypatch):
    monkeypatch.setattr(
        refit_module, "ridge", lambda sums, damping, bias: vtp.pruning.moments.ridge(sums, 0.0, bias)
    )
    model = redundant(family)
    keep = {}
    for i in range(2):
        keep[f"blocks.{i}.mlp.fc2"] = range(10)
        keep[f"blocks.{i}.attn.proj"] = [4 * head + j for head in range(3) for j in range(2)]
    plan = plan_of(model, keep, narrow(model, 2), value_basis="principal")
    images, other = image(model, batch=200), image(model, batch=5, seed=9)
    small = vtp.compact(model, plan, images=images)
    assert relative_error(outputs(small, other), outputs(model, other)) <= 1e-4
    assert vtp.count(small) == plan.cost


def test_twins_are_recovered_with_the_damping_that_is_chosen():
    model = redundant()
    plan = plan_of(model, {"blocks.0.mlp.fc2": range(10)})
    images = image(model, batch=400)
    fitted = vtp.compact(model, plan, images=images)
    plain = vtp.compact(vtp.insert_gates(model), plan)
    dense = outputs(model, images)
    errors = [(outputs(small, images) - dense).square().mean() for small in (fitted, plain)]
    assert errors[0] <= 0.02 * errors[1]


# -- Where something is ------------------------------------------------------------------------------------


def streams(model, small, images):
    """What is behind each block of both models."""
    found = []
    for m in (model, small):
        x = m.norm_pre(m._pos_embed(m.patch_embed(images)))
        found.append([x := block(x) for block in m.blocks])
    return zip(*found, strict=True)


@pytest.mark.parametrize(
    "family",
    [
        *("no-biases", "layer-scale"),
        *(pytest.param(name, marks=pytest.mark.thorough) for name in ("plain", "qk-norm", "average-pool")),
    ],
)
def test_fit_of_the_first_block_is_never_worse_than_the_plain_cut_on_its_own_images(family):
    """Least squares with a damping that draws to the weights of the plain cut: the residual cannot grow."""
    model = build(FAMILIES[family])
    images = image(model, batch=60)
    for site in ("attn.qkv", "mlp.fc1"):
        keep = {f"blocks.0.{site}": range(0, 12, 2)}
        plan = plan_of(model, keep)
        fitted = vtp.compact(model, plan, images=images)
        plain = vtp.compact(vtp.insert_gates(model), plan)
        errors = []
        for small in (fitted, plain):
            x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
            block, own = model.blocks[0], small.blocks[0]
            if site == "mlp.fc1":
                x = x + block.ls1(block.attn(block.norm1(x)))
                got, dense = own.mlp.fc1(own.norm2(x)), block.mlp.fc1(block.norm2(x))
                # What comes before was fitted where it lost nothing, to rounding.
            else:
                got, dense = own.attn.qkv(own.norm1(x)), block.attn.qkv(block.norm1(x))
            errors.append((got - dense).square().mean().item())
        assert errors[0] <= errors[1] * (1 + 1e-9)
    for site, width in (("attn.proj", 12), ("mlp.fc2", 20)):
        plan = plan_of(model, {f"blocks.0.{site}": range(0, width, 2)})
        fitted = vtp.compact(model, plan, images=images)
        plain = vtp.compact(vtp.insert_gates(model), plan)
        errors = [
            (got - dense).square().mean().item()
            for small in (fitted, plain)
            for dense, got in list(streams(model, small, images))[:1]
        ]
        assert errors[0] <= errors[1] * (1 + 1e-9)


@pytest.mark.covering(1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["dimensions", "principal-narrow"])
def test_half_of_everything_is_nearer_to_the_dense_model_than_the_plain_cut(family, kind):
    model = build(FAMILIES[family])
    images, other = image(model, batch=300), image(model, batch=100, seed=9)
    plan = half_plan(model)
    plain = vtp.compact(vtp.insert_gates(model), plan)
    if kind != "dimensions":
        keep = dict(plan.kept)
        for i in range(2):
            keep[f"blocks.{i}.attn.proj"] = [4 * head + j for head in range(3) for j in range(2)]
        keys = {} if FAMILIES[family].whole_keys else narrow(model, 2)
        basis = "dimensions" if FAMILIES[family].scale_attn_norm else "principal"
        plan = plan_of(model, keep, keys, value_basis=basis)
    small = vtp.compact(model, plan, images=images)
    assert vtp.count(small) == plan.cost
    dense = outputs(model, other)
    errors = [(outputs(m, other) - dense).square().mean().item() for m in (small, plain)]
    assert errors[0] <= 0.7 * errors[1]


def test_each_layer_is_the_damped_least_squares_map_to_what_the_stream_lacks():
    """fc2 of the last block of an average-pool model, whose rows are all tokens, solved here by lstsq."""
    model = build(FAMILIES["average-pool"])
    images = image(model, batch=60)
    small = vtp.compact(model, half_plan(model), images=images)
    (dense_stream, _), (dense_out, _) = streams(model, small, images)
    assert dense_stream.shape == dense_out.shape
    own, block = small.blocks[1], model.blocks[1]
    x = small.blocks[0](small.norm_pre(small._pos_embed(small.patch_embed(images))))
    x = x + own.attn(own.norm1(x))
    given = own.mlp.act(own.mlp.fc1(own.norm2(x))).flatten(0, 1).detach()
    kept = list(small.plan.kept["blocks.1.mlp.fc2"])
    prior, bias = block.mlp.fc2.weight.detach()[:, kept], block.mlp.fc2.bias.detach()
    lack = (dense_out - x).flatten(0, 1).detach() - F.linear(given, prior, bias)
    centred, target = given - given.mean(0), lack - lack.mean(0)
    covariance = centred.T @ centred / len(given)
    damping = vtp.pruning.moments.oas_damping(covariance, len(given))
    matrix = torch.cat([centred, (damping * len(given)) ** 0.5 * torch.eye(len(kept), dtype=given.dtype)])
    change = torch.linalg.lstsq(matrix, F.pad(target, (0, 0, 0, len(kept)))).solution.T
    torch.testing.assert_close(own.mlp.fc2.weight.detach(), prior + change, rtol=1e-7, atol=1e-9)
    expected = bias + lack.mean(0) - change @ given.mean(0)
    torch.testing.assert_close(own.mlp.fc2.bias.detach(), expected, rtol=1e-7, atol=1e-9)


def test_queries_keys_and_values_have_the_mean_of_the_dense_models():
    """What a bias is fitted for."""
    model = build()
    images = image(model, batch=60)
    small = vtp.compact(model, plan_of(model, {"blocks.0.attn.qkv": range(0, 12, 2)}), images=images)
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    block, own = model.blocks[0], small.blocks[0]
    got, dense = own.attn.qkv(own.norm1(x)), block.attn.qkv(block.norm1(x))
    assert (got - dense).abs().max() > 1e-3
    torch.testing.assert_close(got.mean((0, 1)), dense.mean((0, 1)), rtol=1e-9, atol=1e-12)


def test_without_feedback_a_branch_does_not_mend_those_before_it():
    model = build()
    plan = half_plan(model)
    images = image(model, batch=100)
    results = []
    for feedback in (True, False):
        small = vtp.compact(vtp.insert_gates(model), plan)
        refit_module.refit(model, small, plan, images, feedback=feedback)
        results.append(small)
    dense, first, second = (outputs(m, images) for m in (model, *results))
    plain = outputs(vtp.compact(vtp.insert_gates(model), plan), images)
    assert not torch.allclose(first, second)
    for got in (first, second):
        assert (got - dense).square().mean() <= 0.7 * (plain - dense).square().mean()


def test_key_width_alone_narrows_every_head():
    model = build()
    images = image(model, batch=100)
    errors = []
    for width in (1, 2, 3, 4):
        statistics = vtp.calibrate(model, images)
        plan = vtp.make_plan(model, rate=0.0, statistics=statistics, key_width=width)
        assert plan.needs_images == (width < 4)
        small = vtp.compact(model, plan, images=images)
        assert all(block.attn.key_widths == (width,) * 3 for block in small.blocks)
        assert vtp.count(small) == plan.cost
        errors.append(relative_error(outputs(small, images), outputs(model, images)))
    assert errors[3] <= 1e-9
    assert errors == sorted(errors, reverse=True)


@pytest.mark.covering(1)
@pytest.mark.parametrize("family", ["plain", "no-biases", "layer-scale", "distilled"])
@pytest.mark.parametrize("basis", ["dimensions", "principal"])
def test_dead_heads_and_branches(family, basis):
    model = build(FAMILIES[family])
    keep = {
        "blocks.0.attn.proj": range(4, 8),  # one head is left
        "blocks.0.mlp.fc1": (),
        "blocks.1.attn.qkv": (),
        "blocks.1.mlp.fc2": range(3),
    }
    plan = plan_of(model, keep, value_basis=basis)
    images = image(model, batch=100)
    small = vtp.compact(model, plan, images=images)
    assert isinstance(small.blocks[0].mlp, ConstantBranch)
    assert isinstance(small.blocks[1].attn, ConstantBranch)
    assert vtp.count(small) == plan.cost
    plain = vtp.compact(vtp.insert_gates(model), plan)
    dense = outputs(model, images)
    errors = [(outputs(m, images) - dense).square().mean() for m in (small, plain)]
    assert errors[0] < errors[1]


def test_nothing_kept_leaves_the_mean_of_what_the_last_block_lacks():
    model = build(FAMILIES["average-pool"])
    plan = dataclasses.replace(plan_of(model), kept=dict.fromkeys(plan_of(model).kept, ()))
    images = image(model, batch=50)
    small = vtp.compact(model, plan, images=images)
    *_, (dense, got) = streams(model, small, images)
    torch.testing.assert_close(got.mean((0, 1)), dense.mean((0, 1)))


@pytest.mark.parametrize("what", ["keys", "both"])
def test_head_whose_keys_never_vary_is_narrowed_to_finite_weights(what):
    model = build(dtype=torch.float32)
    model.blocks[0].attn.qkv.weight.data[12:24] = 0
    if what == "both":
        model.blocks[0].attn.qkv.weight.data[:12] = 0
    images = image(model, batch=50)
    small = vtp.compact(model, plan_of(model, keys=narrow(model, 2)), images=images)
    assert all(parameter.abs().max() < 100 for parameter in small.parameters())
    assert small(images).isfinite().all()


# -- What is left alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_without_images_the_cut_is_exact_as_ever(family):
    model = gated(build(FAMILIES[family]))
    plan = vtp.make_plan(model, rate=0.4)
    x = image(model)
    expected = outputs(with_zeros(model, plan), x)
    assert (outputs(vtp.compact(model, plan), x) - expected).abs().max() <= 1e-12 * expected.abs().max()
    # Weights are folded and gathered, and nothing else: not a bit of them is new.
    small = vtp.compact(model, plan)
    hidden, inputs = (torch.tensor(plan.kept[f"blocks.1.mlp.{layer}"]) for layer in ("fc2", "fc1"))
    weight = vtp.sites(model)["blocks.1.mlp.fc1"].folded_weight()
    rows = hidden_rows(hidden, FAMILIES[family])
    assert torch.equal(small.blocks[1].mlp.fc1.weight, weight[rows][:, inputs])


@pytest.mark.parametrize("fields", [{"keys": True}, {"value_basis": "principal"}], ids=str)
def test_plan_that_takes_images_is_refused_without(fields):
    model = build()
    keys = narrow(model, 3) if fields.pop("keys", False) else {}
    plan = plan_of(model, {"blocks.0.attn.proj": range(2, 12)}, keys, **fields)
    assert plan.needs_images
    with pytest.raises(vtp.PlanError, match=r"^plan: .*takes images; give some to vtp.compact"):
        vtp.compact(vtp.insert_gates(model), plan)


@pytest.mark.parametrize("keep", [range(4, 12), range(12)], ids=["whole heads", "everything"])
def test_principal_plan_of_whole_heads_takes_no_images(keep):
    model = build()
    plan = plan_of(model, {"blocks.0.attn.proj": keep}, value_basis="principal")
    assert not plan.needs_images
    same = dataclasses.replace(plan, value_basis="dimensions")
    x = image(model)
    assert torch.equal(outputs(vtp.compact(model, plan), x), outputs(vtp.compact(model, same), x))


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_dtype_mode_and_the_model_itself_stay_as_they_are(dtype, training):
    architecture = dataclasses.replace(FAMILIES["distilled"], proj_drop_rate=0.1, drop_path_rate=0.1)
    model = build(architecture, dtype=dtype).train(training)
    before = copy.deepcopy(model.state_dict())
    images = image(model, batch=30)
    given = images.clone()
    small = vtp.compact(model, half_plan(model, keys=narrow(model, 3)), images=images)
    assert small.training == model.training == training
    assert all(block.attn.training == training for block in small.blocks)
    assert all(parameter.dtype == dtype and parameter.requires_grad for parameter in small.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(images, given)
    assert outputs(small.eval(), images).isfinite().all()
    shared = {tensor.data_ptr() for tensor in model.parameters()}
    assert not shared & {tensor.data_ptr() for tensor in small.parameters()}


@pytest.mark.parametrize("memory_gb", [0, 1e-5, 3e-5])
def test_result_does_not_depend_on_where_images_lie_and_files_go_with_their_block(
    memory_gb, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("vtp.pruning.streams._PIECE", 30)
    model = build(dataclasses.replace(TINY, depth=4))
    plan, images = half_plan(model), image(model, batch=40)
    most = []

    def count(text, share):
        most.append(sum(len(files) for _, _, files in os.walk(tmp_path)))

    small = vtp.compact(model, plan, images=list(images.split(9)), memory_gb=memory_gb, progress=count)
    expected = vtp.compact(model, plan, images=images)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(small.state_dict()[name], tensor), name
    assert most[-1] == most[1]  # no more before the last block than before the first
    assert most[1] > 0
    assert os.listdir(tmp_path) == []


def test_an_endless_loader_is_read_as_far_as_images_are_kept(monkeypatch):
    monkeypatch.setattr(refit_module, "MOST_IMAGES", 10)
    model = build(TINY)
    plan, images = half_plan(model), image(model, 14)

    def endless():
        yield images[:7], None
        yield images[7:], None
        raise AssertionError("read on")

    small, expected = (vtp.compact(model, plan, images=given) for given in (endless(), images[:10]))
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), expected.parameters(), strict=True))


def test_store_keeps_what_memory_has_room_for_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    piece = torch.arange(6.0).reshape(2, 3)
    with Store(30e-9, torch.device("cpu")) as store:
        assert store.keep(piece) is piece
        second = store.keep(piece)
        assert second is not piece
        assert torch.equal(second, piece)
        with store.for_a_while() as short:
            third = short.keep(piece[:1])
            assert torch.equal(third, piece[:1])
        second += 1
        assert torch.equal(second, piece + 1)
    assert os.listdir(tmp_path) == []


def test_error_in_the_middle_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = build()
    model.blocks[1].mlp.fc2.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"^model: got activations that are NaN"):
        vtp.compact(model, half_plan(model), images=image(model, batch=30), memory_gb=0)
    assert os.listdir(tmp_path) == []
    model.blocks[1].mlp.fc2.bias.data[0] = 0
    plan = half_plan(model)
    dead = dataclasses.replace(plan, kept=dict(plan.kept) | {"blocks.1.mlp.fc1": ()})
    model.blocks[1].mlp.fc2.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"^model: got activations that are NaN"):
        vtp.compact(model, dead, images=image(model, batch=30), memory_gb=0)
    assert os.listdir(tmp_path) == []


# -- A compact model with narrow keys is a model like any other --------------------------------------------


@pytest.fixture(scope="module")
def narrowed():
    model = build(dtype=torch.float32)
    keys = {"blocks.0.attn": (1, 3, 2), "blocks.1.attn": (4, 2, 2)}
    keep = {"blocks.0.attn.proj": (0, 1, 4, 8, 9, 10), "blocks.1.attn.proj": (0, 4, 5, 6, 7, 8)}
    plan = plan_of(model, keep, keys, value_basis="principal")
    return vtp.compact(model, plan, images=image(model, batch=60))


def test_narrow_model_saves_and_loads(narrowed, tmp_path):
    vtp.save(narrowed, tmp_path / "small.safetensors")
    loaded = vtp.load(tmp_path / "small.safetensors")
    assert loaded.plan == narrowed.plan
    x = image(narrowed)
    assert torch.equal(outputs(loaded, x), outputs(narrowed, x))
    assert vtp.count(loaded) == narrowed.plan.cost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_model_is_packed_for_the_cpu(narrowed, dtype):
    x = image(narrowed, batch=3)
    expected = outputs(copy.deepcopy(narrowed).double(), x.double())
    same = relative_error(outputs(copy.deepcopy(narrowed).to(dtype), x.to(dtype)).double(), expected)
    fast = vtp.optimize(narrowed, dtype=dtype)
    got = fast(x.to(dtype)).double()
    assert relative_error(got, expected) <= 2 * same + 1e-6


def test_narrow_model_trains(narrowed):
    model = copy.deepcopy(narrowed).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, labels = image(model, batch=16), torch.arange(16) % 10
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# -- What it costs -----------------------------------------------------------------------------------------


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_refit_fits_qkv_and_fc1_by_their_inputs_and_not_by_their_many_outputs():
    """In float64, whose products are all counted; all rows are fitted."""
    model = build(dataclasses.replace(TINY, embed_dim=96, mlp_hidden=192, global_pool="avg"))
    images = image(model, batch=300)
    plan = plan_of(model)
    passes = 2 * flops(lambda: outputs(model, images))
    assert flops(lambda: vtp.compact(model, plan, images=images)) <= 2.2 * passes


@pytest.mark.parametrize("shape", [(37, 61), (3, 5, 61), (0, 61)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_layers_on_onednn_are_as_exact_as_pytorchs(shape, with_bias):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in (shape, (115, 61), (115,)))
    bias = bias if with_bias else None
    exact = F.linear(x.double(), weight.double(), bias if bias is None else bias.double())
    got, plain = linear(x, weight, bias), F.linear(x, weight, bias)
    assert got.shape == plain.shape
    if x.numel():
        assert_close_to_float64(got, exact, plain)


def test_layers_that_ran_on_onednn_are_plain_ones_again():
    model = build().float()
    with pytest.raises(KeyError), fast_layers(model):
        assert all("forward" in vars(block.mlp.fc1) for block in model.blocks)
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())
