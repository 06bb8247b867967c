"""bench.one_shot: what it compares with is what it says, and a run goes on where it stopped."""

import copy
import dataclasses
import importlib.util
import json

import pytest
import torch

import vtp
from bench import one_shot
from tests.support.models import build
from vtp.training.data import open_data
from vtp.zoo import FASHION_DEIT, open_model


@pytest.fixture(scope="module")
def setting():
    return one_shot.Setting(open_model(FASHION_DEIT).eval(), open_data(), seed=0)


def test_images_are_of_the_training_set_and_depend_on_the_seed(setting):
    images, labels = setting.images(40)
    other, _ = one_shot.Setting(setting.model, setting.data, seed=1).images(40)
    assert images.shape == (40, 1, 28, 28) and len(labels) == 40
    assert not torch.equal(images, other)
    assert one_shot.top1(setting.model, images, labels) > 80


def test_choosing_all_keys_is_the_dense_model_and_fewer_are_what_is_left(setting):
    images, _ = setting.images(16)
    whole = one_shot.choose_keys(setting.model, images, rank=32)
    torch.testing.assert_close(whole(images), setting.model(images))
    some = one_shot.choose_keys(setting.model, images, rank=5)
    for block in some.blocks:
        rows = block.attn.qkv.weight.unflatten(0, (3, 3, 32)).abs().sum(-1) > 0
        assert rows.sum(-1).tolist() == [[5] * 3, [5] * 3, [32] * 3]


def test_macs_are_counted_as_vtp_counts_them(setting):
    assert one_shot.counted_macs(setting.model) == vtp.count(setting.model).macs  # with the fused attention
    small = vtp.compact(setting.model, vtp.make_plan(vtp.insert_gates(setting.model), rate=0.3))
    assert one_shot.counted_macs(small) == vtp.count(small).macs


def test_macs_of_a_cut_with_a_branch_that_became_a_constant_are_counted(setting):
    plan = vtp.make_plan(vtp.insert_gates(setting.model), rate=0.3)
    plan = dataclasses.replace(plan, kept=dict(plan.kept) | {"blocks.1.attn.proj": ()})
    small = vtp.compact(setting.model, plan)
    assert one_shot.counted_macs(small) == vtp.count(small).macs


@pytest.mark.thorough
@pytest.mark.skipif(not importlib.util.find_spec("torch_pruning"), reason="torch-pruning is not installed")
@pytest.mark.parametrize("how", ["Taylor", "magnitude"])
def test_torch_pruning_is_held_to_the_same_macs(setting, how):
    budget = setting.macs(0.55)
    model = one_shot.torch_pruning(setting, budget, how, setting.images(200))
    assert 0.9 * budget < one_shot.counted_macs(model) <= budget


def test_run_goes_on_where_it_stopped_and_prints_its_tables(tmp_path, monkeypatch, capsys):
    measured = []

    def cases(setting):
        def make(name):
            measured.append(name)
            return setting.model, 1.0

        for name in ("ranking/random/0.55/False", "rank/svd/8"):
            yield name, lambda name=name: make(name)

    monkeypatch.setattr(one_shot, "cases", cases)
    monkeypatch.setattr(one_shot, "top1", lambda model, images, labels: 89.25)
    out = tmp_path / "results.json"
    one_shot.run(out, 1, None)
    records = json.loads(out.read_text())
    del records["records"]["0/rank/svd/8"]
    out.write_text(json.dumps(records))
    one_shot.run(out, 1, None)
    assert measured == ["ranking/random/0.55/False", "rank/svd/8", "rank/svd/8"]
    assert one_shot.main(["--markdown", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| random | 89.25 |" in printed and "| whitened SVD |  | 89.25 |" in printed


def test_mended_queries_and_keys_have_the_scores_that_are_there_where_the_rank_allows_it(setting):
    """Queries and keys of rank 5 in 32 dimensions: any 5 that span them carry all scores, once mended."""
    images = setting.images(16)[0].double()
    low = one_shot.plain_copy(copy.deepcopy(setting.model).double())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in low.blocks:
            weight = block.attn.qkv.weight[: 2 * 96].unflatten(0, (6, 32))
            mixed = torch.randn(6, 32, 5, generator=generator) @ torch.randn(6, 5, 96, generator=generator)
            weight.copy_(0.05 * mixed)
            block.attn.qkv.bias[: 2 * 96] = 0
    mended = one_shot.choose_keys(low, images, rank=5, mended=True)
    torch.testing.assert_close(mended(images), low(images), rtol=1e-3, atol=1e-3)
    plain = one_shot.choose_keys(low, images, rank=5)
    assert (plain(images) - low(images)).abs().max() > 0.1


def test_mean_shift_leaves_the_dense_output_where_what_is_removed_is_constant(setting):
    images, _ = setting.images(16)
    plan = vtp.make_plan(vtp.insert_gates(setting.model), rate=0.3, scope="per_site")
    flat = one_shot.plain_copy(setting.model)
    with torch.no_grad():
        for i, block in enumerate(flat.blocks):
            for norm, site in ((block.norm1, "attn.qkv"), (block.norm2, "mlp.fc1")):
                gone = [j for j in range(96) if j not in plan.kept[f"blocks.{i}.{site}"]]
                norm.weight[gone] = 0
            gone = [j for j in range(384) if j not in plan.kept[f"blocks.{i}.mlp.fc2"]]
            block.mlp.fc1.weight[gone] = 0
            gone = [192 + j for j in range(96) if j not in plan.kept[f"blocks.{i}.attn.proj"]]
            block.attn.qkv.weight[gone] = 0
    moments = one_shot.input_moments(flat, plan.kept, images)
    small = vtp.compact(one_shot.with_mean_shift(flat, plan, moments), plan)
    torch.testing.assert_close(small(images), flat(images), rtol=1e-4, atol=1e-4)
    assert (vtp.compact(flat, plan)(images) - flat(images)).abs().max() > 1e-2


def test_time_says_what_each_stage_takes(monkeypatch, capsys):
    monkeypatch.setattr(one_shot.timm, "create_model", lambda name: build())
    assert one_shot.main(["--time", "vit_tiny_patch16_224", "5"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[:3]] == ["calibration", "plan", "cut and refit"]
    assert printed[3].startswith("vit_tiny_patch16_224, 5 images: ")


@pytest.mark.parametrize("given", [("no_such_model", "5"), ("vit_tiny_patch16_224", "0")])
def test_time_of_no_model_or_no_image_is_refused(given, capsys):
    with pytest.raises(SystemExit):
        one_shot.main(["--time", *given])
    assert f"--time: got {' '.join(given)}, expected" in capsys.readouterr().err
