import pytest
import timm
import torch
from torch import nn

import vtp
from tests.support.models import build, gated, image
from vtp.model.architecture import UnsupportedModelError
from vtp.pruning.gates import GatedLinear, sites


def test_outputs_are_bit_equal_at_gate_one():
    model = build(dtype=torch.float32)
    assert torch.equal(vtp.insert_gates(model)(image(model)), model(image(model)))


def test_insert_gates_leaves_the_model_alone_and_shares_nothing():
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = vtp.insert_gates(model)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert isinstance(model.blocks[0].attn.qkv, nn.Linear)


def test_gates_stand_at_the_four_sites_of_each_block_in_forward_order():
    names = list(sites(vtp.insert_gates(build())))
    assert names == [
        f"blocks.{i}.{s}" for i in range(2) for s in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]


def test_gate_scales_the_input_and_its_gradient_is_right():
    torch.manual_seed(0)
    layer = GatedLinear.from_linear(nn.Linear(5, 3).double())
    layer.gate.data = torch.randn(5, dtype=torch.float64)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    expected = (x * layer.gate) @ layer.weight.T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    target = torch.randn_like(expected)
    inputs = (x, layer.weight, layer.gate, layer.bias)
    got = torch.autograd.grad((layer(x) * target).sum(), inputs)
    wanted = torch.autograd.grad((expected * target).sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_gate_stays_float32_beside_a_bfloat16_weight():
    layer = GatedLinear.from_linear(nn.Linear(5, 3).bfloat16())
    assert layer.gate.dtype == torch.float32
    assert layer(torch.randn(2, 5).bfloat16()).dtype == torch.bfloat16


def test_l1_penalty_is_the_sum_of_magnitudes_with_the_sign_as_gradient():
    model = gated(build())
    penalty = vtp.l1_penalty(model)
    gates = [layer.gate for layer in sites(model).values()]
    torch.testing.assert_close(penalty, sum(gate.abs().sum() for gate in gates))
    penalty.backward()
    assert all(torch.equal(gate.grad, gate.sign()) for gate in gates)


def test_taylor_statistics_are_the_sum_of_squares():
    layer = GatedLinear.from_linear(nn.Linear(4, 2))
    layer.gate.data = torch.tensor([1.0, 2.0, 0.0, -1.0])
    for gradient in (torch.tensor([1.0, 1.0, 5.0, 2.0]), torch.tensor([3.0, 0.0, 1.0, 1.0])):
        layer.gate.grad = gradient * 8  # as a loss scale of 8 makes it
        layer.accumulate_taylor(scale=1 / 8)
    assert torch.equal(layer.taylor, torch.tensor([10.0, 4.0, 0.0, 5.0]))
    assert layer.taylor_steps == 2


def test_taylor_without_a_gradient_is_refused():
    with pytest.raises(ValueError, match=r"gate\.grad: got None"):
        GatedLinear(3, 2).accumulate_taylor()


def test_second_insertion_is_refused():
    with pytest.raises(ValueError, match="has gates already"):
        vtp.insert_gates(vtp.insert_gates(build()))


def test_sites_of_a_dense_model_are_refused():
    with pytest.raises(ValueError, match="no gates"):
        sites(build())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("eva02_enormous_patch14_clip_224", r"blocks\.0: EvaBlockPostNorm"),
        ("vit_base_patch16_sapiens2", r"blocks\.0\.attn\.q_norm: RmsNorm"),
        ("aimv2_large_patch14_224", r"blocks\.0\.norm1: RmsNorm"),
        ("vit_base_patch16_rpn_224", r"blocks\.0: ResPostBlock"),
        ("vit_base_patch16_xp_224", r"blocks\.0: ParallelScalingBlock"),
        ("vit_small_patch16_18x2_224", r"blocks\.0: ParallelThingsBlock"),
        ("vit_dwee_patch16_reg1_gap_256", r"blocks\.0\.attn: DiffAttention"),
        ("vit_tiny_r_s16_p8_224", "patch_embed: HybridEmbed"),
        ("beit_base_patch16_224", "timm.models.beit.Beit"),
        ("resnet18", "timm.models.resnet.ResNet"),
    ],
)
def test_unsupported_model_is_refused_by_name(name, part):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match=part):
        vtp.insert_gates(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.blocks[1].mlp, "act", nn.Tanh()),
        lambda model: setattr(model.blocks[0], "norm1", nn.BatchNorm1d(12)),
        lambda model: setattr(model.blocks[1], "ls1", nn.Linear(12, 12)),
        lambda model: setattr(model, "norm", nn.LayerNorm(12, eps=0.5)),
        lambda model: setattr(model, "extra", nn.Linear(2, 2)),
        lambda model: setattr(model.blocks[0].attn, "qkv", nn.Sequential(nn.Linear(12, 36))),
        lambda model: setattr(model.blocks[1].mlp, "fc1", nn.Linear(12, 10)),
        lambda model: setattr(model, "head", nn.Linear(12, 11)),
    ],
    ids=["activation", "batchnorm", "layer-scale", "eps", "extra-module", "wrapped-linear", "width", "head"],
)
def test_model_with_a_foreign_part_is_refused(change):
    model = build()
    change(model)
    with pytest.raises(UnsupportedModelError):
        vtp.insert_gates(model)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_compiled_training_step_is_the_eager_one_without_a_graph_break(autocast):
    model = gated(build(dtype=torch.float32)).train()
    images, targets = image(model, batch=4), torch.tensor([0, 1, 2, 3])

    def gradients(function):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = function(images)
        loss = nn.functional.cross_entropy(logits.float(), targets) + 1e-4 * vtp.l1_penalty(model)
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    eager, compiled = gradients(model), gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    for name, gradient in eager.items():
        assert torch.equal(gradient, compiled[name]), name
