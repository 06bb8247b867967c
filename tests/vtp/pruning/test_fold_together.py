"""The gates of a block folded at once, as on a GPU in eager mixed precision; here by PyTorch's operators."""

import copy
import dataclasses
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import vtp
from tests.support.models import FAMILIES, TINY, build
from tests.support.op_checks import saved_by
from vtp.pruning import gates
from vtp.pruning.gates import GatedLinear, sites
from vtp_kernels.gated_linear import fold_gates
from vtp_kernels.launching import forced_path

# All inputs of linears are multiples of 8.
WIDTHS = {"embed_dim": 16, "num_heads": 2, "mlp_hidden": 24}


@pytest.fixture
def folds(monkeypatch):
    """For each call of a block whether its gates were folded together, as is forced here."""
    found = []

    def noted(*arguments):
        found.append(fold_gates(*arguments))
        return found[-1]

    monkeypatch.setattr(gates, "fold_gates", noted)
    with forced_path("gated_linear", "together"):
        yield found


def gated_model(family="plain"):
    """In training, with random gates of both signs, one of them 0."""
    model = vtp.insert_gates(build(dataclasses.replace(FAMILIES[family], **WIDTHS), torch.float32)).train()
    generator = torch.Generator().manual_seed(1)
    for layer in sites(model).values():
        layer.gate.data = torch.randn(layer.gate.shape, generator=generator)
        layer.gate.data[0] = 0.0
    return model


def images():
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def step(model):
    """Outputs and gradients by name of one pass under autocast, which leaves no gradients behind."""
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images())
    out.float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out, gradients


def assert_same(one, other):
    """Bit for bit, as each product and rounding is the same."""
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(gradient, other[1][name]) for name, gradient in one[1].items())


def apart(model):
    with forced_path("gated_linear", "apart"):
        return step(model)


@pytest.mark.parametrize("family", ["plain", "no-biases", "rotary", "inner-norms", "swiglu"])
def test_outputs_and_gradients_are_those_of_gates_folded_one_by_one(folds, family):
    model = gated_model(family)
    expected = apart(model)
    folds.clear()
    assert_same(step(model), expected)
    assert len(folds) == 2 and None not in folds
    assert {f"{name}.gate" for name in sites(model)} < expected[1].keys()


def test_with_checkpointed_blocks_they_are_too(folds):
    model = gated_model()
    expected = apart(model)
    model.set_grad_checkpointing()
    folds.clear()
    assert_same(step(model), expected)
    assert len(folds) == 4 and None not in folds
    assert not gates._folded.of


def test_a_compiled_block_has_neither_breaks_nor_folds(folds):
    model = gated_model()
    expected = apart(model)
    folds.clear()
    torch.compiler.reset()
    model.blocks[1].compile(fullgraph=True, backend="aot_eager")
    assert_same(step(model), expected)
    assert len(folds) == 1  # of the other block


def test_a_call_that_fails_leaves_no_weight_behind(folds):
    model = gated_model()

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.blocks[1].mlp.act.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model)
    handle.remove()
    assert not gates._folded.of
    copy.deepcopy(model)
    with torch.no_grad():
        for layer in sites(model).values():
            layer.gate.add_(1.0)
    expected = apart(model)
    assert_same(step(model), expected)


def test_a_call_that_ctrl_c_ends_changes_neither_later_calls_nor_copies(folds):
    model = gated_model()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.blocks[1].mlp.act.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(model)
    handle.remove()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for layer in sites(model).values():
            layer.gate.add_(1.0)
        model.eval()(images())  # float32, after bfloat16
    assert_same(step(model.train()), apart(model))
    assert_same(step(copied), apart(copied))


def test_threads_take_nothing_from_each_other(folds):
    model = gated_model()
    expected = apart(model)[0].detach()
    wrong = []

    def work():
        for _ in range(10):
            with torch.autocast("cpu", torch.bfloat16):
                out = model(images())
            try:
                torch.autograd.grad(out.float().sum(), model.blocks[1].mlp.fc2.gate)
            except RuntimeError as error:
                wrong.append(error)
            if not torch.equal(out, expected):
                wrong.append(out)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_weight_that_its_layer_gets_when_called_is_that_one(folds):
    model = gated_model()
    prune.random_unstructured(model.blocks[0].mlp.fc1, "weight", 0.5)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight_orig.mul_(2.0)
    assert_same(step(model), apart(model))


def test_a_branch_may_be_replaced():
    model = gated_model()
    model.blocks[0].mlp = nn.Identity()
    assert model(images()).isfinite().all()


def test_no_more_is_saved_for_the_backward_pass_than_without_gates(folds):
    dense = build(dataclasses.replace(TINY, **WIDTHS), torch.float32).train()
    sizes = []
    for model in (dense, vtp.insert_gates(dense)):
        block, own = model.blocks[0], {p.data_ptr() for p in model.parameters()}
        with torch.autocast("cpu", torch.bfloat16):
            saved = saved_by(block, torch.randn(3, 5, 16, requires_grad=True))
        sizes.append(sum(tensor.nbytes for address, tensor in saved.items() if address not in own))
    assert len(folds) == 1 and sizes[0] == sizes[1]


def test_a_second_derivative_is_refused(folds):
    model = gated_model()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images())
    weight = model.blocks[0].mlp.fc1.weight
    with pytest.raises(NotImplementedError, match="gated_linear has no second derivative"):
        torch.autograd.grad(out.float().sum(), weight, create_graph=True)


def set_requires_grad(model, name, value):
    model.get_parameter(name).requires_grad_(value)


# What keeps a block's gates apart.
REASONS = {
    "a frozen weight": lambda model: set_requires_grad(model, "blocks.0.mlp.fc1.weight", False),
    "a frozen gate": lambda model: set_requires_grad(model, "blocks.0.attn.qkv.gate", False),
    "a bfloat16 weight": lambda model: model.blocks[0].attn.qkv.bfloat16(),
    "a transposed weight": lambda model: setattr(
        model.blocks[0].attn.proj, "weight", nn.Parameter(torch.randn(16, 16).t())
    ),
    "a linear without a gate": lambda model: setattr(model.blocks[0].attn, "proj", nn.Linear(16, 16)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_where_it_does_not_apply_each_folds_its_own(folds, reason):
    model = gated_model()
    REASONS[reason](model)
    with torch.autocast("cpu", torch.bfloat16):
        model.blocks[0](torch.randn(1, 5, 16, requires_grad=True))
    assert folds in ([], [None])


def test_it_is_for_training_in_mixed_precision_alone(folds):
    model = gated_model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(images())
    model(images()).sum().backward()
    assert folds == [None] * 4
    odd = vtp.insert_gates(build(TINY, torch.float32)).train()  # 12 and 20 inputs
    with torch.autocast("cpu", torch.bfloat16):
        odd(images())
    assert folds == [None] * 6


def test_on_a_cpu_it_has_to_be_forced():
    layers = [GatedLinear.from_linear(nn.Linear(8, 8)) for _ in range(4)]
    tensors = ([getattr(layer, name) for layer in layers] for name in ("weight", "gate", "bias"))
    with torch.autocast("cpu", torch.bfloat16):
        assert fold_gates(torch.randn(2, 8), *tensors) is None


def test_a_gated_model_with_its_hooks_is_cut_copied_and_gated_no_further():
    model = gated_model()
    small = vtp.compact(copy.deepcopy(model), vtp.make_plan(model, rate=0.4))
    assert vtp.count(small).macs < vtp.count(model).macs
    assert not small.blocks[0]._forward_pre_hooks
    model.blocks[0].register_forward_hook(lambda module, arguments, out: 2 * out)
    with pytest.raises(vtp.UnsupportedModelError, match=r"blocks\.0: it has a forward hook"):
        vtp.compact(model, vtp.make_plan(gated_model(), rate=0.4))
