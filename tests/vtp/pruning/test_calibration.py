"""Calibration: what its statistics are, however images come and wherever they lie, and what is refused."""

import copy
import dataclasses
import errno
import itertools
import math
import os
import tempfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vtp
from tests.support.models import FAMILIES, TINY, build, gated, image
from vtp.files import FileError
from vtp.model.architecture import UnsupportedModelError
from vtp.model.widths import SITES
from vtp.pruning import calibration
from vtp.pruning.calibration import Statistics
from vtp.pruning.dense_block import read_tokens
from vtp.pruning.streams import ImagesError, Store, embedded, plain_copy


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def images(model):
    return image(model, batch=40)


@pytest.fixture(scope="module")
def statistics(model, images):
    return vtp.calibrate(model, images)


def assert_equal(got, expected):
    assert sorted(got.tensors) == sorted(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert torch.equal(got.tensors[name], tensor), name
    for field in ("architecture", "parent", "images", "change_images", "change"):
        assert getattr(got, field) == getattr(expected, field)


def site_inputs(model, images):
    """What goes into each site, rows by site name."""
    found, hooks = {}, []
    for i, block in enumerate(model.blocks):
        for site in SITES:
            name = f"blocks.{i}.{site}"

            def note(module, given, name=name):
                found[name] = given[0].flatten(0, 1)

            hooks.append(block.get_submodule(site).register_forward_pre_hook(note))
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


# -- What it says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_finite_statistics_of_every_unit(family):
    model = build(FAMILIES[family])
    statistics = vtp.calibrate(model, image(model, batch=20))
    architecture = statistics.architecture
    assert statistics.change == ("KL" if architecture.num_classes > 1 else "relative error")
    for name, tensor in statistics.tensors.items():
        assert tensor.dtype == torch.float64, name
        assert tensor.isfinite().all(), name
        assert (tensor >= 0).all(), name
    for name, width in architecture.site_widths().items():
        assert statistics.tensors[f"{name}.order"].sort().values.tolist() == list(range(width))
        assert statistics.tensors[f"{name}.errors"].shape == (width + 1,)
    narrow = "blocks.0.attn.keys" in statistics.tensors
    assert narrow == (not architecture.whole_keys)
    # Each unit matters: what is measured would be 0 if a change did not reach the output.
    values = "attn.proj" if architecture.scale_attn_norm else "attn.values"
    for i, unit in itertools.product(range(architecture.depth), ("attn.qkv", values, "mlp.fc2")):
        assert (statistics.tensors[f"blocks.{i}.{unit}.changes"][:, 1] > 0).all()


def test_variances_and_shares_are_those_of_what_goes_into_each_site(model, images, statistics):
    for name, rows in site_inputs(model, images).items():
        variance = rows.var(0, correction=0)
        weight = model.get_submodule(name).weight
        torch.testing.assert_close(statistics.tensors[f"{name}.variance"], variance, rtol=1e-9, atol=1e-12)
        share = weight.detach().square().sum(0) * variance
        torch.testing.assert_close(statistics.tensors[f"{name}.activation"], share, rtol=1e-9, atol=1e-12)


def test_layer_scale_counts_as_a_part_of_the_weights():
    model = build(FAMILIES["layer-scale"])
    folded = build()
    state = {name: tensor for name, tensor in model.state_dict().items() if ".ls" not in name}
    for i, (ls, layer) in itertools.product(range(2), (("ls1", "attn.proj"), ("ls2", "mlp.fc2"))):
        gamma = model.blocks[i].get_submodule(ls).gamma.detach()
        state[f"blocks.{i}.{layer}.weight"] = state[f"blocks.{i}.{layer}.weight"] * gamma[:, None]
        state[f"blocks.{i}.{layer}.bias"] = state[f"blocks.{i}.{layer}.bias"] * gamma
    folded.load_state_dict(state)
    images = image(model, batch=20)
    got, expected = vtp.calibrate(model, images), vtp.calibrate(folded, images)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor, rtol=1e-6, atol=1e-12, msg=name)


def divergence(model, changed, images):
    with torch.no_grad():
        dense, got = model(images).log_softmax(-1), changed(images).log_softmax(-1)
    return F.kl_div(got, dense, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("site", ["attn.qkv", "mlp.fc1", "mlp.fc2"])
def test_measured_change_is_that_of_the_model_with_the_unit_really_cut(
    model, images, statistics, block, site
):
    """The layer is refitted here by least squares on what goes into it, with rows for the damping."""
    name = f"blocks.{block}.{site}"
    kept_number, change = statistics.tensors[f"{name}.changes"][1].tolist()
    order = statistics.tensors[f"{name}.order"].long()
    kept = order[len(order) - int(kept_number) :]
    rows = site_inputs(model, images)[name]
    cut = copy.deepcopy(model)
    layer = cut.get_submodule(name)
    centred = rows[:, kept] - rows[:, kept].mean(0)
    covariance = centred.T @ centred / len(rows)
    damping = vtp.pruning.moments.oas_damping(covariance, len(rows))
    eye = torch.eye(len(kept), dtype=rows.dtype)
    with torch.no_grad():
        target = (rows - rows.mean(0)) @ layer.weight.T
        matrix = torch.cat([centred, (damping * len(rows)) ** 0.5 * eye])
        weight = torch.linalg.lstsq(matrix, F.pad(target, (0, 0, 0, len(kept)))).solution.T
        mean = F.linear(rows.mean(0), layer.weight, layer.bias)
        layer.weight.zero_()
        layer.weight[:, kept] = weight
        layer.bias.copy_(mean - layer.weight @ rows.mean(0))
    probed = images[: statistics.change_images]
    assert change == pytest.approx(divergence(model, cut, probed), rel=1e-6)


@pytest.mark.parametrize(("branch", "unit"), [("attn", "attn.qkv"), ("mlp", "mlp.fc2")])
def test_measured_change_without_a_branch_is_that_of_its_mean(model, images, statistics, branch, unit):
    cut, last = copy.deepcopy(model), "attn.proj" if branch == "attn" else "mlp.fc2"
    rows = site_inputs(model, images)[f"blocks.1.{last}"]
    layer = cut.blocks[1].get_submodule(last)
    with torch.no_grad():
        layer.bias.copy_(F.linear(rows.mean(0), layer.weight, layer.bias))
        layer.weight.zero_()
    width, change = statistics.tensors[f"blocks.1.{unit}.changes"][0].tolist()
    assert width == 0
    probed = images[: statistics.change_images]
    assert change == pytest.approx(divergence(model, cut, probed), rel=1e-9)


@pytest.mark.parametrize("classes", [10, 1])
def test_change_of_a_multi_label_model_is_that_of_its_answers_for_each_class(images, classes):
    model = build(FAMILIES["plain"] if classes > 1 else FAMILIES["one-class"])
    statistics = vtp.calibrate(model, images, multi_label=True)
    assert statistics.change == "binary KL"
    cut = copy.deepcopy(model)
    rows = site_inputs(model, images)["blocks.1.mlp.fc2"]
    layer = cut.blocks[1].mlp.fc2
    probed = images[: statistics.change_images]
    with torch.no_grad():
        layer.bias.copy_(F.linear(rows.mean(0), layer.weight, layer.bias))
        layer.weight.zero_()
        dense, got = (torch.distributions.Bernoulli(logits=each(probed)) for each in (model, cut))
        expected = torch.distributions.kl_divergence(dense, got).sum(1).mean().item()
    _, change = statistics.tensors["blocks.1.mlp.fc2.changes"][0].tolist()
    assert change == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_last_block_with_the_tokens_that_are_read_alone_gives_the_models_output(family):
    model = build(FAMILIES[family])
    images = image(model, batch=3)
    with Store(None, torch.device("cpu")) as store:
        stream = embedded(model, images, store, most=3)
        read = read_tokens(vtp.describe(model))
        last = calibration._Block.of(model.blocks[-1], stream.ropes[-1], read)
        output = calibration._Probe(model, stream, last, multi_label=False)._dense
    assert (read is None) == (family in ("average-pool", "fc-norm", "features"))
    torch.testing.assert_close(output, model(images), rtol=1e-12, atol=1e-12)


def test_measured_change_of_narrow_keys_is_that_of_the_model_cut_to_them(model, images, statistics):
    """By the compact model: all images and no damping, so that only queries and keys change."""
    for block in range(2):
        total, change = statistics.tensors[f"blocks.{block}.attn.keys.changes"][0].tolist()
        plan = vtp.make_plan(model, rate=0.0, statistics=statistics)
        keys = {f"blocks.{block}.attn": (int(total) // 3,) * 3}
        small = vtp.compact(model, dataclasses.replace(plan, keys=keys), images=images)
        # What comes behind in the compact model is fitted again: only the block before that is the same.
        probed = images[: statistics.change_images]
        with torch.no_grad():
            stream = [m.norm_pre(m._pos_embed(m.patch_embed(probed))) for m in (model, small)]
            for i in range(block):
                stream = [m.blocks[i](x) for m, x in zip((model, small), stream, strict=True)]
            dense, cut = model.blocks[block], small.blocks[block]
            q, k, _ = cut.attn.qkv(cut.norm1(stream[1])).split([int(total), int(total), 12], -1)
            heads = [t.unflatten(-1, (3, -1)).transpose(1, 2) for t in (q, k)]
            value = dense.attn.qkv(dense.norm1(stream[0])).chunk(3, -1)[2].unflatten(-1, (3, -1))
            out = F.scaled_dot_product_attention(*heads, value.transpose(1, 2), scale=dense.attn.scale)
            x = stream[0] + dense.attn.proj(out.transpose(1, 2).flatten(2))
            x = x + dense.mlp(dense.norm2(x))
            for later in model.blocks[block + 1 :]:
                x = later(x)
            logits = model.forward_head(model.norm(x)).log_softmax(-1)
            expected = F.kl_div(logits, model(probed).log_softmax(-1), log_target=True, reduction="batchmean")
        assert change == pytest.approx(expected.item(), rel=1e-5)


def test_narrow_keys_are_those_of_scores_that_the_softmax_sees(model, images, statistics):
    """What is equal for all keys of a head changes no output, so it has no part in what a rank carries."""
    shifted = copy.deepcopy(model)
    for block in shifted.blocks:
        width = block.attn.qkv.out_features // 3
        block.attn.qkv.bias.data[width : 2 * width] += 3.0
    got = vtp.calibrate(shifted, images)
    for i in range(len(model.blocks)):
        name = f"blocks.{i}.attn.keys"
        torch.testing.assert_close(got.tensors[name], statistics.tensors[name], rtol=1e-6, atol=1e-12)


def test_large_logits_of_half_precision_have_a_finite_divergence():
    model = build()
    with torch.no_grad():
        model.head.weight *= 3e4
    statistics = vtp.calibrate(model, image(model, batch=20))
    assert all(tensor.isfinite().all() for tensor in statistics.tensors.values())


# -- However images come, and wherever they lie ------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("size", [1, 7, 40])
@pytest.mark.parametrize("kind", ["list", "loader", "generator"])
def test_statistics_are_those_of_one_batch_however_images_are_batched(
    model, images, statistics, size, kind, monkeypatch
):
    parts = images.split(size)
    given = {
        "list": list(parts),
        "loader": [(part, torch.zeros(len(part), dtype=torch.int64)) for part in parts],
        "generator": (part for part in parts),
    }[kind]
    assert_equal(vtp.calibrate(model, given), statistics)


@pytest.mark.parametrize("tokens", [1, 30, 70])
def test_pieces_add_up_to_the_whole(model, images, statistics, tokens, monkeypatch):
    monkeypatch.setattr("vtp.pruning.streams._PIECE", tokens)
    got = vtp.calibrate(model, images)
    for name, tensor in statistics.tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor, rtol=1e-6, atol=1e-12, msg=name)


@pytest.mark.parametrize("memory_gb", [0, 1e-6, 5])
def test_statistics_do_not_depend_on_where_images_lie(model, images, memory_gb, monkeypatch):
    monkeypatch.setattr("vtp.pruning.streams._PIECE", 30)
    assert_equal(vtp.calibrate(model, images, memory_gb=memory_gb), vtp.calibrate(model, images))


def test_disk_without_room_is_said_and_nothing_is_left(model, images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FileError, match=r"memory_gb.*no room.*No space left on device"):
        vtp.calibrate(model, images, memory_gb=0)
    assert not list(tmp_path.iterdir())


def test_images_beyond_the_rows_that_are_looked_at_are_not_read(model, images, monkeypatch):
    monkeypatch.setattr(calibration, "ROWS_PER_INPUT", 0)
    monkeypatch.setattr(calibration, "LEAST_ROWS", 50)  # of 5 tokens

    def loader():
        yield images[:7]
        yield images[7:14]
        raise AssertionError("read on")

    statistics = vtp.calibrate(model, loader())
    assert statistics.images == 10
    assert_equal(statistics, vtp.calibrate(model, images))


def test_gates_count_as_a_part_of_the_weights(images):
    with_gates = gated(build())
    dense = build()
    for name, layer in vtp.sites(with_gates).items():
        dense.get_submodule(name).weight.data = layer.folded_weight().detach()
    statistics = vtp.calibrate(with_gates, images)
    assert_equal(statistics, vtp.calibrate(dense, images))
    statistics.check_model(with_gates)
    statistics.check_model(dense)


def test_half_precision_is_calibrated_in_float32():
    model = build(dtype=torch.bfloat16)
    images = image(model, batch=20)
    assert_equal(vtp.calibrate(model, images), vtp.calibrate(copy.deepcopy(model).float(), images.float()))


def test_model_is_not_changed(images):
    model = build().train()
    model.blocks[0].attn.attn_drop.p = model.blocks[0].attn.proj_drop.p = 0.3
    model.blocks[1].attn.attn_drop.p = model.blocks[1].attn.proj_drop.p = 0.3
    model.blocks[0].mlp.drop1.p = model.blocks[1].mlp.drop1.p = 0.3
    model.blocks[0].mlp.drop2.p = model.blocks[1].mlp.drop2.p = 0.3
    before, given = copy.deepcopy(model.state_dict()), images.clone()
    statistics = vtp.calibrate(model, images)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(images, given)
    torch.testing.assert_close(dict(statistics.tensors), dict(vtp.calibrate(build(), images).tensors))


def test_sums_of_one_block_are_alive_at_a_time(images, monkeypatch):
    alive, most = [0], [0]

    class Counted(calibration.Moments):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    monkeypatch.setattr(calibration, "Moments", Counted)
    model = build(dataclasses.replace(TINY, depth=4))
    vtp.calibrate(model, images)
    one_block = len(SITES) + 2 * TINY.num_heads
    assert most[0] <= one_block * 2  # the next block's are made while the last name still holds this one's


def test_progress_is_told_and_ends_below_one(model, images):
    told = []
    vtp.calibrate(model, images, progress=lambda text, share: told.append((text, share)))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] < 1
    assert told[0][0].startswith("40 images of 5 tokens")


# -- Degenerate images and models --------------------------------------------------------------------------


KINDS = ("one image", "constant images", "dead units", "fewer samples than dimensions", "tiny", "twins")
DEGENERATE = [("plain", kind) for kind in KINDS]
DEGENERATE += [("features", "one image"), ("features", "constant images"), ("one-class", "one image")]
DEGENERATE += [("no-biases", "dead units"), ("layer-scale", "constant images"), ("distilled", "one image")]


@pytest.mark.parametrize(("family", "kind"), DEGENERATE)
def test_degenerate_images_and_models_give_a_finite_model(family, kind):
    model = build(FAMILIES[family])
    images = image(model, batch=12)
    if kind == "one image":
        images = images[:1]
    elif kind == "constant images":
        images = torch.ones_like(images)
    elif kind == "fewer samples than dimensions":
        images = images[:2]
    elif kind == "tiny":
        images = images * 1e-30
        model.pos_embed.data *= 1e-30
        model.patch_embed.proj.bias.data *= 1e-30
        if model.cls_token is not None:
            model.cls_token.data *= 1e-30
    elif kind == "twins":
        model.blocks[0].mlp.fc1.weight.data[1] = model.blocks[0].mlp.fc1.weight.data[0]
    elif model.blocks[0].mlp.fc1.bias is not None:
        model.blocks[0].mlp.fc1.weight.data[:15] = 0
        model.blocks[0].attn.qkv.weight.data[:20] = 0
    else:
        model.blocks[0].mlp.fc1.weight.data[:] = 0
    statistics = vtp.calibrate(model, images)
    for name, tensor in statistics.tensors.items():
        assert tensor.isfinite().all(), name
    dense = vtp.make_plan(vtp.insert_gates(model), rate=0.0).dense_cost.macs
    for arguments in ({"scope": "optimal"}, {"score": "obs", "key_width": 1}):
        plan = vtp.make_plan(model, macs=0.5 * dense, statistics=statistics, **arguments)
        assert plan.cost.macs <= 0.5 * dense
        small = vtp.compact(model, plan, images=images)
        assert small(images).isfinite().all()
        assert all(parameter.isfinite().all() for parameter in small.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_activations_give_a_finite_model_or_are_named(dtype):
    model = build(dtype=dtype)
    model.blocks[0].mlp.fc1.weight.data *= 1e18
    images = image(model, batch=20)
    try:
        statistics = vtp.calibrate(model, images)
        plan = vtp.make_plan(model, macs=0.5 * vtp.count(model).macs, statistics=statistics, scope="optimal")
        assert vtp.compact(model, plan, images=images)(images).isfinite().all()
    except ValueError as error:
        assert str(error).startswith("model: got activations")
        assert dtype == torch.float32


def test_one_class_is_not_cut_as_if_nothing_mattered():
    model = build(FAMILIES["one-class"])
    statistics = vtp.calibrate(model, image(model, batch=20))
    changes = [
        statistics.tensors[f"blocks.{i}.{u}.changes"] for i in range(2) for u in ("attn.qkv", "mlp.fc1")
    ]
    assert all((points[:, 1] > 1e-9).all() for points in changes)


# -- What is refused ---------------------------------------------------------------------------------------


def not_finite(images, value):
    images = images.clone()
    images[-1, 0, 0, 0] = value
    return images


REFUSED = {
    "nan": (lambda x: not_finite(x, math.nan), "they contain NaN or infinity"),
    "inf": (lambda x: not_finite(x, math.inf), "they contain NaN or infinity"),
    "empty tensor": (lambda x: x[:0], "got none, expected at least one"),
    "empty list": (lambda x: [], "got none, expected at least one"),
    "iterator that yields nothing": (lambda x: iter(()), "got none, expected at least one"),
    "empty batches": (lambda x: [x[:0], x[:0]], "got none, expected at least one"),
    "none": (lambda x: None, "got NoneType, expected a tensor or an iterable"),
    "a number": (lambda x: 3, "got int, expected a tensor or an iterable"),
    "numbers": (lambda x: [1, 2], r"got int, expected tensors \[M, 1, 8, 8\]"),
    "an empty tuple": (lambda x: [()], r"got tuple, expected tensors \[M, 1, 8, 8\]"),
    "a dict": (lambda x: [{"image": x}], r"got dict, expected tensors \[M, 1, 8, 8\]"),
    "numpy": (lambda x: x.numpy(), r"got ndarray, expected tensors \[M, 1, 8, 8\]"),
    "0-d": (lambda x: x.sum(), r"got shape \(\), expected \[M, 1, 8, 8\]"),
    "one image without a batch": (lambda x: x[0], r"got shape \(1, 8, 8\), expected \[M, 1, 8, 8\]"),
    "channels": (lambda x: x.repeat(1, 3, 1, 1), r"got shape \(40, 3, 8, 8\), expected \[M, 1, 8, 8\]"),
    "size": (lambda x: x[..., :4], r"got shape \(40, 1, 8, 4\), expected \[M, 1, 8, 8\]"),
    "a later batch": (lambda x: [x, x[..., :4]], r"got shape \(40, 1, 8, 4\), expected \[M, 1, 8, 8\]"),
    "labels": (lambda x: torch.arange(40), r"got shape \(40,\), expected \[M, 1, 8, 8\]"),
    "labels first": (lambda x: [(torch.arange(40), x)], r"got shape \(40,\), expected \[M, 1, 8, 8\]"),
    "bytes": (lambda x: x.to(torch.uint8), "got torch.uint8, expected normalised images"),
}
ALIKE = [kind for kind in REFUSED if kind not in ("none", "nan", "iterator that yields nothing", "labels")]


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        *(("calibrate", kind) for kind in REFUSED),
        *(("compact", kind) for kind in ("nan", "iterator that yields nothing", "labels")),
        *(pytest.param("compact", kind, marks=pytest.mark.thorough) for kind in ALIKE),
    ],
)
def test_what_are_no_images_is_refused_with_what_came_and_leaves_no_files(
    model, images, statistics, kind, what, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("vtp.pruning.streams._PIECE", 30)
    make, message = REFUSED[kind]
    with pytest.raises(ImagesError, match=f"^images: {message}"):
        if what == "calibrate":
            vtp.calibrate(model, make(images), memory_gb=0)
        else:
            plan = vtp.make_plan(model, rate=0.5, statistics=statistics)
            vtp.compact(model, plan, images=make(images), memory_gb=0)
    assert os.listdir(tmp_path) == []


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "where", ["blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias", "norm.weight", "cls_token"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named_and_leave_no_files(
    images, where, value, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = build()
    dict(model.named_parameters())[where].data.view(-1)[0] = value
    with pytest.raises(ValueError, match=r"^model: got .* expected finite"):
        vtp.calibrate(model, images, memory_gb=0)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("memory_gb", [-1, math.nan])
def test_bad_memory_is_refused_by_name(model, images, memory_gb):
    with pytest.raises(ValueError, match=r"^memory_gb: got"):
        vtp.calibrate(model, images, memory_gb=memory_gb)


def test_what_is_no_vision_transformer_is_refused(images, model):
    for other in (nn.Linear(3, 3), vtp.compact(model, vtp.make_plan(vtp.insert_gates(model), rate=0.5))):
        with pytest.raises(UnsupportedModelError):
            vtp.calibrate(other, images)


def test_plain_copy_takes_a_model_with_gates_at_some_sites():
    model = gated(build())
    model.blocks[0].attn.qkv = nn.Linear(12, 36).double()
    x = image(model)
    torch.testing.assert_close(plain_copy(model)(x), model(x))


# -- Files -------------------------------------------------------------------------------------------------


@pytest.fixture
def path(statistics, tmp_path):
    statistics.save(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def test_file_brings_back_equal_statistics_and_the_same_plan(model, statistics, path):
    loaded = Statistics.load(path)
    assert_equal(loaded, statistics)
    macs = 0.6 * vtp.count(model).macs
    plans = [vtp.make_plan(model, macs=macs, statistics=s, scope="optimal") for s in (loaded, statistics)]
    assert plans[0] == plans[1]
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_file_that_is_cut_off_is_refused(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(FileError, match=r"^path: .*damaged or cut off"):
        Statistics.load(path)


@pytest.mark.parametrize("where", [0.7, 0.9])
def test_file_that_was_changed_is_refused(path, where):
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"^path: .*was changed after it was written"):
        Statistics.load(path)


def test_file_of_something_else_is_refused(model, tmp_path):
    vtp.save(model, tmp_path / "model.safetensors")
    with pytest.raises(FileError, match=r"^path: .*is .*, expected the statistics of a calibration"):
        Statistics.load(tmp_path / "model.safetensors")
    with pytest.raises(FileError, match=r"^path: .*is a folder, expected the statistics of a calibration"):
        Statistics.load(tmp_path)
    with pytest.raises(FileError, match=r"^path: no file .*missing"):
        Statistics.load(tmp_path / "missing")


def test_statistics_of_other_weights_are_refused(statistics):
    with pytest.raises(ValueError, match=r"^statistics: .*other weights.*call vtp.calibrate"):
        statistics.check_model(build(seed=1))
    with pytest.raises(vtp.PlanError, match=r"^statistics: .*other weights"):
        vtp.make_plan(build(seed=1), rate=0.5, statistics=statistics)


def test_statistics_that_are_none_or_something_else_are_refused_by_name(model):
    for arguments in ({"scope": "optimal"}, {"score": "obs"}):
        with pytest.raises(vtp.PlanError, match=r"^statistics: got None, expected those of vtp.calibrate"):
            vtp.make_plan(model, rate=0.5, **arguments)
    with pytest.raises(vtp.PlanError, match=r"^statistics: got dict"):
        vtp.make_plan(model, rate=0.5, statistics={})


def test_shares_that_are_measured_are_numbers_of_widths(statistics):
    for i in range(2):
        assert statistics.tensors[f"blocks.{i}.mlp.fc2.changes"][:, 0].tolist() == [0, 5]
        assert statistics.tensors[f"blocks.{i}.attn.keys.changes"][:, 0].tolist() == [3]
        assert np.diff(statistics.tensors[f"blocks.{i}.attn.values.changes"][:, 0]) > 0


def test_weights_on_the_meta_device_are_refused_before_anything(model, images, tmp_path):
    empty = copy.deepcopy(model).to("meta")
    plan = vtp.make_plan(vtp.insert_gates(model), rate=0.5)
    calls = {
        "calibrate": lambda: vtp.calibrate(empty, images),
        "make_plan": lambda: vtp.make_plan(vtp.insert_gates(empty), rate=0.5),
        "compact": lambda: vtp.compact(empty, plan, images=images),
        "save": lambda: vtp.save(empty, tmp_path / "model.safetensors"),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"^model: \S+ is on the meta device, .*expected weights"):
            call()
    assert not list(tmp_path.iterdir())


def test_statistics_are_no_model_and_say_so(tmp_path):
    model = build(dtype=torch.float32)
    vtp.calibrate(model, image(model, batch=4)).save(tmp_path / "statistics.safetensors")
    with pytest.raises(FileError, match=r"is the statistics of a calibration, expected a model"):
        vtp.load(tmp_path / "statistics.safetensors")
