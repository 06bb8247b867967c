"""What is done on a GPU, on a device that is not the CPU: all tensors there, and the CPU's results."""

import contextlib
import itertools
import tempfile
import traceback
from multiprocessing.connection import Connection

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import vtp
from tests.support.other_device import other_device
from tests.support.processes import forks
from vtp.training.evaluation import evaluate_batches
from vtp.training.sparsity import soft_threshold

NAMES = {
    "vit_small_patch14_dinov2": dict(init_values=0.1),
    "eva02_tiny_patch14_224": {},
}
IMAGES = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 10


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    small = dict(img_size=32, patch_size=8, depth=2, embed_dim=16, num_heads=2, mlp_ratio=2, num_classes=10)
    made = timm.create_model(name, **small, **NAMES[name])
    nn.init.normal_(made.head.weight, std=0.2)
    return made.eval()


def devices(small: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*small.parameters(), *small.buffers())}


def cut_in_one_shot(name: str) -> None:
    on_cpu = vtp.calibrate(model(name), IMAGES)
    budget = dict(macs=0.5 * vtp.count(model(name)).macs, score="obs", scope="optimal")
    plan = vtp.make_plan(model(name), statistics=on_cpu, **budget)
    expected = vtp.compact(model(name), plan, images=IMAGES)(IMAGES)
    with other_device() as device, torch.no_grad():
        dense = model(name).requires_grad_(False).to(device)
        for memory in (dict(), dict(memory_gb=1e-5))[: 2 if name.startswith("vit") else 1]:
            found = vtp.calibrate(dense, IMAGES, **memory)
            assert found.tensors.keys() == on_cpu.tensors.keys()
            for key, tensor in found.tensors.items():
                assert tensor.device.type == "cpu"
                if not key.endswith("order"):
                    assert_close(tensor, on_cpu.tensors[key], rtol=1e-3, atol=1e-6)
            again = vtp.make_plan(dense, statistics=found, **budget)
            small = vtp.compact(dense, again, images=IMAGES, **memory)
            assert again.kept == plan.kept
            assert devices(small) == {device.type}
            assert_close(small(IMAGES.to(device)).cpu(), expected, rtol=1e-3, atol=1e-4)


def train_with_gates_and_cut(name: str) -> None:
    with other_device() as device:
        gated = vtp.insert_gates(model(name).to(device))
        optimizer = torch.optim.AdamW(gated.parameters(), lr=1e-3)
        images, labels = IMAGES.to(device), LABELS.to(device)
        for _ in range(2):
            loss = F.cross_entropy(gated(images), labels) + 1e-4 * vtp.l1_penalty(gated)
            loss.backward()
            for layer in vtp.sites(gated).values():
                layer.accumulate_taylor()
            optimizer.step()
            optimizer.zero_grad()
            soft_threshold([layer.gate for layer in vtp.sites(gated).values()], 1e-3)
        for score in ("gate", "taylor"):
            plan = vtp.make_plan(gated, rate=0.4, score=score)
            small = vtp.compact(gated.eval(), plan)
            assert devices(gated) == devices(small) == {device.type}
            outputs = small(images)
            assert_close(vtp.expand(small)(images).cpu(), outputs.cpu(), rtol=1e-4, atol=1e-5)
        outputs.square().mean().backward()
        assert all(parameter.grad.device == device for parameter in small.parameters())
        with tempfile.TemporaryDirectory() as folder:
            vtp.save(small, f"{folder}/small.safetensors")
            loaded = vtp.load(f"{folder}/small.safetensors")
        found = evaluate_batches(small, [(IMAGES, LABELS)], contextlib.nullcontext)
        assert found == pytest.approx(evaluate_batches(loaded, [(IMAGES, LABELS)], contextlib.nullcontext))


FUNCTIONS = (cut_in_one_shot, train_with_gates_and_cut)


def _run_all(pipe: Connection) -> None:
    """Sends for each function and model what went wrong, as a text."""
    torch.set_num_threads(1)
    for function in FUNCTIONS:
        for name in NAMES:
            try:
                function(name)
                pipe.send("")
            except BaseException:
                pipe.send(traceback.format_exc())


@pytest.fixture(scope="module")
def errors():
    """What went wrong, by function and model, in a process of its own."""
    here, there = forks().Pipe()
    process = forks().Process(target=_run_all, args=(there,))
    process.start()
    there.close()
    found = {}
    try:
        for case in itertools.product(FUNCTIONS, NAMES):
            assert here.poll(120), f"{case}: no answer in two minutes"
            found[case] = here.recv()
    finally:
        process.kill()
        process.join()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_all_is_done_on_the_device_of_the_model(function, name, errors):
    assert not errors[function, name], errors[function, name]
