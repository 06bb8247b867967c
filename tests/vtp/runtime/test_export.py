"""Export: what each target writes computes the same in that target, for any number of images; what fails its
check, or is refused, leaves no file."""

import collections
import copy
import dataclasses
import functools
import json

import pytest
import torch

import vtp
from tests.support.models import FAMILIES, TINY, build, gated, image
from tests.support.processes import python
from vtp.model.images import set_image_config
from vtp.pruning.compact import CompactViT, ConstantBranch
from vtp.runtime.accuracy import CEILINGS, relative_error
from vtp.runtime.export import TARGETS, ExportError, checked, export_onnx, export_pt2, pt2

KEYS = {"blocks.0.attn": (4, 1, 3), "blocks.1.attn": (2, 4, 4)}
# Of ExecuTorch, which takes half a minute, not in the quick lane.
EACH = [
    pytest.param(target, marks=[pytest.mark.thorough] if target == "executorch" else []) for target in TARGETS
]
SAID = {"mean": (0.1,), "std": (0.2,), "crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bilinear"}
NAMES = tuple("abcdefghij")


# What takes the time of an export grows with the blocks.
ONE_BLOCK = dataclasses.replace(TINY, depth=1)


@functools.cache
def compact_model(family: str = "", rate: float = 0.4) -> vtp.CompactViT:
    """A cut model of one of the families, or of a single block, which says what its images are."""
    model = gated(build(FAMILIES.get(family, ONE_BLOCK), torch.float32))
    small = vtp.compact(model, vtp.make_plan(model, rate=rate)).eval()
    if not family:
        set_image_config(small, **SAID, label_names=NAMES)
    return small


@functools.cache
def dense_model() -> torch.nn.Module:
    return build(ONE_BLOCK, torch.float32).eval()


@functools.cache
def narrow_model() -> vtp.CompactViT:
    """One whose heads have keys of unequal widths too."""
    plan = dataclasses.replace(compact_model("plain").plan, keys=KEYS)
    torch.manual_seed(0)
    return CompactViT(plan).eval()


def available(target: str) -> None:
    """Skip where a package of the target is missing."""
    for package in TARGETS[target][0].packages:
        pytest.importorskip(package)


def run_onnx(file, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["outputs"], {"images": images.numpy()})[0])


def run_openvino(file, images):
    import openvino

    model = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert model.input("images").partial_shape.to_string() == "[?,1,8,8]"
    return torch.from_numpy(model({"images": images.float().numpy()})["outputs"])


def run_pt2(file, images):
    return torch.export.load(file).module()(images)


def run_executorch(file, images):
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(file)
    return program.load_method("forward").execute([images])[0].clone()


RUN = {"onnx": run_onnx, "openvino": run_openvino, "pt2": run_pt2, "executorch": run_executorch}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Files by (target, model, dtype), each made once; what the runtime gives for them at a batch size."""

    @functools.cache
    def exported(target: str, model: torch.nn.Module, dtype: torch.dtype = torch.float32):
        available(target)
        file = tmp_path_factory.mktemp("export") / f"model{TARGETS[target][0].suffix}"
        said = TARGETS[target][1](model, file, dtype=dtype)
        assert 0 < said <= CEILINGS[str(dtype).removeprefix("torch.")]
        return file

    return exported


def check(target, file, model, dtype=torch.float32):
    for batch in (1, 3):
        x = image(model, batch=batch).float()
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
        found = RUN[target](file, x.to(dtype))
        assert relative_error(found, exact) <= CEILINGS[str(dtype).removeprefix("torch.")]


@pytest.mark.parametrize("target", EACH)
def test_a_compact_model_gives_its_own_outputs_at_any_batch_size(export, target):
    check(target, export(target, compact_model()), compact_model())


@pytest.mark.parametrize("target", ["onnx", "openvino", "pt2"])
def test_so_does_one_with_keys_of_unequal_widths(export, target):
    check(target, export(target, narrow_model()), narrow_model())


@pytest.mark.parametrize("target", ["onnx", "openvino", "pt2"])
def test_so_does_a_dense_model(export, target):
    check(target, export(target, dense_model()), dense_model())


OF_ANY_SIZE = {
    "class-token": {},
    "registers": {"no_embed_class": True, "reg_tokens": 2},
    "padded": {"dynamic_img_pad": True},
}


# What resamples would be in the program of torch.export already, of which all other targets are made.
@pytest.mark.parametrize(
    "target",
    [pytest.param(name, marks=[] if name == "pt2" else [pytest.mark.thorough]) for name in TARGETS],
)
@pytest.mark.parametrize(
    "kind",
    [
        "class-token",
        pytest.param("registers", marks=pytest.mark.thorough),
        pytest.param("padded", marks=pytest.mark.thorough),
    ],
)
def test_a_model_of_any_image_size_is_written_for_one_without_resampling(tmp_path, kind, target):
    available(target)
    architecture = dataclasses.replace(ONE_BLOCK, dynamic_img_size=True, **OF_ANY_SIZE[kind])
    model = gated(build(architecture, torch.float32))
    small = vtp.compact(model, vtp.make_plan(model, rate=0.4)).eval()
    before = copy.deepcopy(small.state_dict())
    for size in ((8, 8), (12, 7 if kind == "padded" else 4)):
        file = tmp_path / f"model{TARGETS[target][0].suffix}"
        assert TARGETS[target][1](small, file, (1, *size)) <= CEILINGS["float32"]
        if target == "pt2":
            assert not any("upsample" in str(node.target) for node in torch.export.load(file).graph.nodes)
    assert small.dynamic_img_size and all(
        torch.equal(before[name], t) for name, t in small.state_dict().items()
    )


@pytest.mark.thorough
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_so_does_every_kind_of_model(export, target, family):
    check(target, export(target, compact_model(family)), compact_model(family))


@pytest.mark.thorough
@pytest.mark.parametrize("target", TARGETS)
def test_so_does_one_whose_branches_are_gone(export, target):
    model = compact_model("layer-scale", rate=0.9)
    model.blocks[0].norm1, model.blocks[0].attn = torch.nn.Identity(), ConstantBranch(12)
    model.blocks[0].ls1 = torch.nn.Identity()
    check(target, export(target, model), model)


@pytest.mark.parametrize(
    "target, dtype",
    [
        ("pt2", "bfloat16"),
        *(pytest.param(name, "float16", marks=pytest.mark.thorough) for name in TARGETS),
    ],
)
def test_half_precision_where_the_target_has_it(export, target, dtype):
    dtype = getattr(torch, dtype)
    before = copy.deepcopy(compact_model().state_dict())
    check(target, export(target, compact_model(), dtype), compact_model(), dtype)
    assert all(torch.equal(before[name], now) for name, now in compact_model().state_dict().items())


@pytest.mark.parametrize("heads", ["dense", "values", "keys"])
def test_onnx_runtime_runs_attention_as_one_node(export, tmp_path, heads):
    available("onnx")
    import onnx
    import onnxruntime

    models = {"dense": dense_model(), "values": compact_model(), "keys": narrow_model()}
    model = models[heads]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(export("onnx", model), options, providers=["CPUExecutionProvider"])
    nodes = collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    blocks = model.blocks
    # Of a head each where they have unequal widths, else of all heads of a block.
    in_nodes = len(blocks) if heads == "dense" else sum(block.attn.num_heads for block in blocks)
    assert nodes["Attention"] == in_nodes
    assert nodes["Softmax"] == 0
    assert nodes["BiasGelu"] == len(blocks)


@pytest.mark.parametrize("heads", ["values", "keys"])
def test_openvino_runs_attention_as_one_node(export, heads):
    available("openvino")
    import openvino

    model = {"values": compact_model(), "keys": narrow_model()}[heads]
    read = openvino.Core().read_model(export("openvino", model))
    nodes = collections.Counter(node.get_type_name() for node in read.get_ops())
    assert nodes["ScaledDotProductAttention"] == sum(block.attn.num_heads for block in model.blocks)
    compiled = openvino.Core().compile_model(read, "CPU").get_runtime_model()
    kinds = {node.get_rt_info()["layerType"].astype(str) for node in compiled.get_ops()}
    assert not kinds & {"Softmax", "MatMul"}


@pytest.mark.thorough
def test_opset_is_the_one_asked_for(tmp_path):
    available("onnx")
    import onnx

    export_onnx(compact_model(), tmp_path / "model.onnx", opset=18)
    written = onnx.load(tmp_path / "model.onnx")
    assert [(each.domain, each.version) for each in written.opset_import] == [("", 18)]
    assert "Attention" not in {node.op_type for node in written.graph.node}


def said_in_onnx(file):
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.get_modelmeta().custom_metadata_map


def said_in_openvino(file):
    import openvino

    model = openvino.Core().read_model(file)
    return {
        name: model.get_rt_info(["vtp", name]).astype(str) for name in model.get_rt_info("vtp").astype(dict)
    }


@pytest.mark.parametrize("target, said_in", [("onnx", said_in_onnx), ("openvino", said_in_openvino)])
def test_a_file_says_what_its_images_and_classes_are(export, target, said_in):
    found = {key: json.loads(value) for key, value in said_in(export(target, compact_model())).items()}
    assert found == json.loads(json.dumps({**SAID, "input_size": (1, 8, 8), "label_names": NAMES}))


def test_pt2_runs_where_nothing_but_pytorch_is_installed(export):
    x = image(compact_model(), batch=3)
    script = f"""
import sys
assert "vtp" not in sys.modules and "vtp_kernels" not in sys.modules
for name in ("vtp", "vtp_kernels", "timm", "torchvision"):
    sys.modules[name] = None  # an import of it fails
import torch
program = torch.export.load({str(export("pt2", compact_model()))!r}).module()
print(program(torch.tensor({x.tolist()})).flatten().tolist())
"""
    done = python(script)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = compact_model()(x).flatten()
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected)


def test_a_file_that_computes_something_else_never_has_its_name(tmp_path, monkeypatch):
    small, file, convert = compact_model(), tmp_path / "model.pt2", pt2.exported
    file.write_text("what was there before")

    def wrong(model, images):
        model = copy.deepcopy(model)
        model.head.bias.data += 0.01
        return convert(model, images)

    def for_two_images(model, images):
        return torch.export.export(model, (images,))

    def failing(model, images):
        raise RuntimeError("no such operator\nand more")

    for broken, message in (
        (wrong, r"torch.export computes something else, with 1 image in float32: relative error 0\.0"),
        (for_two_images, "torch.export cannot run with 1 image it"),
        (failing, r"torch.export cannot convert it \(RuntimeError: no such operator\); nothing was written"),
    ):
        monkeypatch.setattr(pt2, "exported", broken)
        with pytest.raises(ExportError, match=message):
            export_pt2(small, file)
        assert [each.name for each in tmp_path.iterdir()] == ["model.pt2"]
        assert file.read_text() == "what was there before"


def test_outputs_are_compared_on_the_images_that_are_given(tmp_path, monkeypatch):
    convert, small = pt2.exported, compact_model()

    class WrongForOne(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(images) + (images.amax(dim=(1, 2, 3)) > 50).float()[:, None]

    monkeypatch.setattr(pt2, "exported", lambda model, images: convert(WrongForOne(model), images))
    file, images = tmp_path / "model.pt2", image(small, batch=7)
    export_pt2(small, file, images=images[:2])
    images[4, 0, 0, 0] = 60
    with pytest.raises(ExportError, match="with 5 images"):
        export_pt2(small, file, images=images)


def test_float16_that_overflows_is_no_bound(tmp_path):
    small = copy.deepcopy(compact_model())
    small.head.weight.data *= 1e6
    with pytest.raises(ExportError, match=r"relative error (nan|inf)"):
        export_pt2(small, tmp_path / "model.pt2", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path, monkeypatch, target):
    small, (described, export) = compact_model(), TARGETS[target]
    file = tmp_path / f"model{described.suffix}"
    monkeypatch.setattr(checked, "find_spec", lambda name: True)
    with pytest.raises(TypeError, match="model: got OptimizedViT"):
        export(vtp.optimize(small), file)
    with pytest.raises(ValueError, match="model: got one in training mode"):
        export(copy.deepcopy(small).train(), file)
    with pytest.raises(ValueError, match="model: on meta, expected cpu"):
        export(copy.deepcopy(small).to("meta"), file)
    with pytest.raises(TypeError, match="model: got one with gates"):
        export(gated(build(TINY, torch.float32)).eval(), file)
    for shape in ((3, 8), (1, 0, 8), [1, 8, 8]):
        with pytest.raises(ValueError, match="image_shape: got"):
            export(small, file, shape)
    for images in (torch.zeros(0, 1, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(1, 8, 8), [1]):
        with pytest.raises(ValueError, match=r"images: got .*expected a tensor \[at least 1, 1, 8, 8\]"):
            export(small, file, images=images)
    with pytest.raises(ValueError, match="images: got values that are not finite"):
        export(small, file, images=torch.full((2, 1, 8, 8), torch.nan))
    for dtype in {torch.bfloat16, torch.int8} - set(described.dtypes):
        with pytest.raises(
            ValueError, match=f"dtype: got {str(dtype)[6:]}, expected one that .* has: float32"
        ):
            export(small, file, dtype=dtype)
    with pytest.raises(vtp.FileError):
        export(small, tmp_path / "missing" / file.name)
    if described.packages:
        monkeypatch.setattr(checked, "find_spec", lambda name: None)
        with pytest.raises(
            ModuleNotFoundError, match=rf"{described.packages[-1]}: pip install 'vtp\[{target}\]'"
        ):
            export(small, file)
    assert list(tmp_path.iterdir()) == []


def test_limits_of_onnx_and_names_of_openvino_are_kept(tmp_path, monkeypatch):
    small = compact_model()
    for opset in (17, 99):
        with pytest.raises(ValueError, match=f"opset: got {opset}, expected 18 to 23"):
            export_onnx(small, tmp_path / "model.onnx", opset=opset)
    with pytest.raises(ValueError, match=r"path: got .*model\.bin, expected a name that ends in \.xml"):
        TARGETS["openvino"][1](small, tmp_path / "model.bin")
    monkeypatch.setattr("vtp.runtime.export.onnx.MOST_BYTES", 100)
    monkeypatch.setattr(checked, "find_spec", lambda name: True)
    with pytest.raises(ExportError, match="GiB of weights, expected less than the 2 GiB"):
        export_onnx(small, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
