"""What works with which backbone: pruned, kept in a file, run by each engine, exported to each target.

    python -m bench.backbones               # table and JSON, some minutes
    python -m bench.backbones --markdown    # that of docs/supported-models.md, from a run's file

timm's models by their names, a block or two deep and for small images, with random weights everywhere. Each
is gated, cut to widths that are unequal in every layer and head, and then everything that is promised of it
is checked against the model in float64. Nothing is timed. The tests do the same for more of timm's names.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from torch import Tensor, nn

import vtp
from bench.results_file import markdown_table, run_or_print, write_results
from vtp.comparison.exported import runtime_version
from vtp.comparison.tables import Rows
from vtp.machine import environment
from vtp.model.architecture import UnsupportedModelError
from vtp.pruning.compact import CompactModel
from vtp.runtime.accuracy import CEILINGS, relative_error
from vtp.runtime.ahead_of_time import kernels
from vtp.runtime.export import TARGETS, ExportError

OUT = Path(__file__).parent / "results" / "backbones.json"
RATE, SEED = 0.5, 0
# Names from timm, each with arguments that make it small; two blocks deep unless said.
MODELS: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {"img_size": 32, "depth": 12},
    "deit_small_patch16_224": {"img_size": 32},
    "deit_base_patch16_224": {"img_size": 32},
    "deit_tiny_distilled_patch16_224": {"img_size": 32},
    "deit_base_distilled_patch16_384": {"img_size": 48},
    "deit3_small_patch16_224": {"img_size": 32},
    "deit3_medium_patch16_224": {"img_size": 32, "depth": 3},
    "deit3_large_patch16_384": {"img_size": 32},
    "vit_tiny_patch16_224": {"img_size": (32, 48)},
    "vit_small_patch8_224": {"img_size": 24},
    "vit_small_patch32_224": {"img_size": 64},
    "vit_base_patch16_gap_224": {"img_size": 32},
    "vit_base_patch14_dinov2": {"img_size": 28},
    "vit_small_patch14_dinov2": {"img_size": 42},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28},
    "vit_giant_patch14_dinov2": {"img_size": 28, "embed_dim": 384},
    "vit_giant_patch14_reg4_dinov2": {"img_size": 28, "embed_dim": 192, "depth": 1},
    "vit_base_patch16_siglip_224": {"img_size": 32},
    "vit_base_patch16_siglip_gap_224": {"img_size": 32},
    "vit_so400m_patch14_siglip_224": {"img_size": 28, "depth": 1},
    "vit_xsmall_patch16_clip_224": {"img_size": 32},
    "vit_medium_patch32_clip_224": {"img_size": 64, "depth": 3},
    "vit_base_patch16_clip_quickgelu_224": {"img_size": 32, "embed_dim": 384},
    "vit_wee_patch16_reg1_gap_256": {"img_size": 32},
    "vit_little_patch16_reg4_gap_256": {"img_size": 32},
    "vit_mediumd_patch16_reg4_gap_256": {"img_size": 32, "depth": 3},
    "vit_betwixt_patch16_reg4_gap_256": {"img_size": 32, "depth": 3},
    "vit_so150m2_patch16_reg1_gap_256": {"img_size": 32},
    "vit_so150m_patch16_reg4_map_256": {"img_size": 32, "depth": 1},
    "vit_intern300m_patch14_448": {"img_size": 28},
    "vit_small_patch16_384": {"img_size": 32, "depth": 3, "qk_norm": True, "init_values": 0.1},
    "vit_tiny_patch16_384": {"img_size": 32, "dynamic_img_size": True},
    "beit3_base_patch16_224": {"img_size": 32, "embed_dim": 192, "num_heads": 6},
    "beit3_large_patch16_224": {"img_size": 32, "embed_dim": 256, "num_heads": 4, "depth": 1},
    "flexivit_small": {"img_size": 32, "class_token": False, "global_pool": "avg"},
    # timm's Eva.
    "vit_small_patch16_dinov3": {"img_size": (32, 48)},
    "vit_small_plus_patch16_dinov3": {"img_size": 32},
    "vit_base_patch16_dinov3": {"img_size": 32, "depth": 1},
    "vit_large_patch16_dinov3": {"img_size": 32, "depth": 1, "embed_dim": 512},
    "vit_huge_plus_patch16_dinov3": {"img_size": 32, "depth": 1, "embed_dim": 320},
    "vit_small_patch16_dinov3_qkvb": {"img_size": 32},
    "vit_small_plus_patch16_dinov3_qkvb": {"img_size": 32},
    "eva02_tiny_patch14_224": {"img_size": (28, 42)},
    "eva02_small_patch14_224": {"img_size": 28},
    "eva02_base_patch14_224": {"img_size": 28, "embed_dim": 384, "num_heads": 6},
    "eva02_base_patch14_448": {"img_size": (28, 42), "embed_dim": 192, "num_heads": 3},
    "eva02_large_patch14_224": {"img_size": 28, "embed_dim": 256, "num_heads": 4},
    "eva02_large_patch14_448": {"img_size": 28, "embed_dim": 128, "num_heads": 2, "depth": 1},
    "eva02_base_patch16_clip_224": {"img_size": 32, "embed_dim": 384, "num_heads": 6},
    "eva02_large_patch14_clip_224": {"img_size": 28, "embed_dim": 256, "num_heads": 4},
    "eva02_large_patch14_clip_336": {"img_size": 28, "embed_dim": 192, "num_heads": 3, "depth": 1},
    "eva_giant_patch14_224": {"img_size": 28, "embed_dim": 352},
    "vit_small_patch16_rope_224": {"img_size": (32, 48)},
    "vit_small_patch16_rope_ape_224": {"img_size": 32},
    "vit_small_patch16_rope_mixed_224": {"img_size": (32, 48)},
    "vit_small_patch16_rope_mixed_ape_224": {"img_size": 32},
    "vit_medium_patch16_rope_reg1_gap_256": {"img_size": 32},
    "vit_mediumd_patch16_rope_reg1_gap_256": {"img_size": 32},
    "vit_betwixt_patch16_rope_reg4_gap_256": {"img_size": 32},
    "vit_pe_core_tiny_patch16_384": {"img_size": 32},
    "vit_pe_core_base_patch16_224": {"img_size": 32, "depth": 1},
    "vit_pe_core_gigantic_patch14_448": {"img_size": 28, "embed_dim": 384},
    "vit_pe_spatial_tiny_patch16_512": {"img_size": (32, 48)},
    "vit_pe_lang_large_patch14_448": {"img_size": 28, "embed_dim": 384},
}
# But for their widths, smaller models have each of the traits that these have: the table has none of them.
ALIKE = {
    "deit_small_patch16_224", "deit_base_patch16_224", "deit_base_distilled_patch16_384",
    "deit3_medium_patch16_224", "deit3_large_patch16_384", "vit_small_patch8_224", "vit_small_patch32_224",
    "vit_base_patch14_dinov2", "vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_224",
    "vit_medium_patch32_clip_224", "vit_mediumd_patch16_reg4_gap_256", "vit_betwixt_patch16_reg4_gap_256",
    "vit_so400m_patch14_siglip_224", "vit_so150m2_patch16_reg1_gap_256", "vit_intern300m_patch14_448",
    "vit_base_patch16_dinov3", "vit_large_patch16_dinov3", "vit_huge_plus_patch16_dinov3",
    "vit_small_plus_patch16_dinov3_qkvb", "eva02_small_patch14_224", "vit_small_patch16_rope_ape_224",
    "vit_small_patch16_rope_mixed_ape_224", "vit_medium_patch16_rope_reg1_gap_256",
    "vit_mediumd_patch16_rope_reg1_gap_256", "vit_pe_core_base_patch16_224",
    "vit_base_patch16_gap_224", "vit_pe_spatial_tiny_patch16_512", "vit_giant_patch14_reg4_dinov2",
    "eva02_base_patch14_448", "eva02_large_patch14_224", "eva02_large_patch14_448",
    "eva02_large_patch14_clip_224", "eva02_large_patch14_clip_336", "beit3_large_patch16_224",
}  # fmt: skip
# Classes of transformers, each with the arguments of a small configuration beside these.
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": {"intermediate_size": 96},
    "DeiTForImageClassification": {"intermediate_size": 96},
    "DeiTForImageClassificationWithTeacher": {"intermediate_size": 96},
    "Dinov2Model": {"mlp_ratio": 2},
    "Dinov2WithRegistersModel": {"mlp_ratio": 2, "use_swiglu_ffn": True},
    "DINOv3ViTModel": {"intermediate_size": 96, "num_register_tokens": 4},
}
# One of each kind that is refused.
REFUSED = (
    "eva02_enormous_patch14_clip_224",
    "vit_base_patch16_sapiens2",
    "aimv2_large_patch14_224",
    "vit_base_patch16_18x2_224",
    "vit_base_patch16_rpn_224",
    "vit_base_patch16_xp_224",
    "vit_dwee_patch16_reg1_gap_256",
    "vit_tiny_r_s16_p8_224",
    "beit_base_patch16_224",
)


class BrokenPromiseError(AssertionError):
    """Something does not hold that is promised of every supported backbone."""


def toy(name: str, **changes: Any) -> nn.Module:
    """A model of a name in `MODELS` or `TRANSFORMERS`, small, with random weights, float64, in eval mode.

    changes: to the arguments from there, of timm's models.

    Raises:
        ModuleNotFoundError: it is of transformers, which is not installed.
    """
    torch.manual_seed(SEED)
    if name in TRANSFORMERS:
        import transformers

        cls = getattr(transformers, name)
        model = vtp.from_transformers(cls(cls.config_class(**SMALL, **TRANSFORMERS[name])).eval()).double()
    else:
        model = timm.create_model(name, **{"depth": 2, **MODELS[name], **changes}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Zero biases and tiny LayerScale, as timm starts them, would hide a wrong cut.
            scale = 0.5 if parameter.ndim <= 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale)
    return model


def images(model: nn.Module, batch: int = 2) -> Tensor:
    """Random images of the model's size."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def check_pruned(model: nn.Module) -> CompactModel:
    """Gate and cut a model, which has to be exact. Returns the compact one, in float32.

    Raises:
        BrokenPromiseError: outputs at gate 1, or of the cut, or the counted cost are not what they must be.
    """
    x = images(model)
    dense, gated = model(x), vtp.insert_gates(model)
    _expect(relative_error(gated(x), dense) <= 1e-12, "a model with gates of 1 is not the dense one")
    generator = torch.Generator().manual_seed(SEED)
    for layer in vtp.sites(gated).values():
        layer.gate.copy_(torch.randn(layer.in_features, generator=generator))
    plan = vtp.make_plan(gated, rate=RATE, min_keep=0)
    small, zeroed = vtp.compact(gated, plan), copy.deepcopy(gated)
    for name, layer in vtp.sites(zeroed).items():
        kept = torch.zeros_like(layer.gate)
        kept[list(plan.kept[name])] = 1
        layer.gate.mul_(kept)
    error = relative_error(small(x), zeroed(x))
    _expect(error <= 1e-12, f"the cut is not exact: relative error {error:.1e}")
    _expect(vtp.count(small) == plan.cost, f"predicted {plan.cost}, counted {vtp.count(small)}")
    again = vtp.expand(small)
    _expect(relative_error(again(x), small(x)) <= 1e-12, "the expanded model computes something else")
    return small.float()


@torch.no_grad()
def check_file(small: CompactModel, folder: Path) -> str:
    """Save and load a compact model: every output stays, bit for bit."""
    vtp.save(small, folder / "small.safetensors")
    x = images(small).float()
    _expect(torch.equal(vtp.load(folder / "small.safetensors")(x), small(x)), "a loaded model differs")
    return "works"


@torch.no_grad()
def check_cpu(small: CompactModel, folder: Path) -> str:
    """Optimize a compact model on the CPU, float32 and bfloat16. Returns what runs it."""
    x = images(small)
    exact, fast = copy.deepcopy(small).double()(x), vtp.optimize(small)
    _expect_close(fast(x.float()), exact, small(x.float()), torch.float32)
    half = vtp.optimize(small, torch.bfloat16)
    plain = copy.deepcopy(small).bfloat16()(x.bfloat16())
    _expect_close(half(x.bfloat16()), exact, plain, torch.bfloat16)
    return fast.engine if fast.engine.startswith("plain") else "works"


def check_triton(small: CompactModel, folder: Path) -> str:
    """List the kernels that a compact model launches on a GPU; nothing runs there."""
    launched = kernels(small, torch.bfloat16, "sm_90")
    _expect(bool(launched), "no kernel is launched")
    return f"{len(launched)} kernels"


def check_export(target: str) -> Callable[[CompactModel, Path], str]:
    """Exports a compact model to a target, which checks its outputs."""

    def check(small: CompactModel, folder: Path) -> str:
        runtime, export = TARGETS[target]
        export(small, folder / f"small{runtime.suffix}")
        return "works"

    return check


CHECKS: dict[str, Callable[[CompactModel, Path], str]] = {
    "file": check_file,
    "CPU engine": check_cpu,
    "Triton": check_triton,
    **{target: check_export(target) for target in TARGETS},
}


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BrokenPromiseError(otherwise)


def _expect_close(got: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """Within the project's bound for a dtype, or twice what PyTorch makes of it."""
    bound = max(CEILINGS[str(dtype).removeprefix("torch.")], 2 * relative_error(plain, exact))
    error = relative_error(got, exact)
    _expect(error <= bound, f"relative error {error:.1e} in {dtype}, at most {bound:.1e} expected")


def record(name: str, folder: Path) -> dict[str, str]:
    """What works with a backbone, or why not, by column."""
    found = {"prune": "works"}
    small = check_pruned(toy(name))
    for column, check in CHECKS.items():
        try:
            found[column] = check(small, folder)
        except (ExportError, ModuleNotFoundError, ValueError) as error:
            found[column] = f"refused: {error}"
    return found


def refusal(name: str) -> str:
    """Why a model of timm's is refused."""
    with torch.device("meta"):
        model = timm.create_model(name)
    try:
        vtp.insert_gates(model)
    except UnsupportedModelError as error:
        return str(error)
    raise BrokenPromiseError(f"{name} is not refused")


def supported_names() -> list[str]:
    """timm's names of the classes that are supported of which the model, as it is by default, is too."""
    found = []
    for module in ("vision_transformer", "deit", "eva"):
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                model = timm.create_model(name)
            try:
                vtp.describe(model)
            except UnsupportedModelError:
                continue
            found.append(name)
    return sorted(found)


def tables(content: dict[str, Any]) -> dict[str, Rows]:
    """By title: what works, and what is refused."""
    columns = ["prune", *CHECKS]
    works: Rows = [["model", *(content["runtimes"].get(column, column) for column in columns)]]
    works += [[name, *(found[column] for column in columns)] for name, found in content["models"].items()]
    refused: Rows = [["model", "why"], *([name, why] for name, why in content["refused"].items())]
    return {"Supported": works, "Refused": refused}


def markdown(content: dict[str, Any]) -> str:
    """The tables of docs/supported-models.md."""
    names = f"{len(content['names'])} names of timm {content['environment']['timm']}.\n"
    return "\n".join([names, *map(markdown_table, tables(content).values())])


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """What works with which model, written down after each."""
    content: dict[str, Any] = {
        "rate": RATE,
        "environment": environment(),
        "runtimes": {name: runtime_version(target) for name, (target, _) in TARGETS.items()},
        "models": {},
        "refused": {name: refusal(name) for name in REFUSED},
        "names": supported_names(),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in (*(name for name in MODELS if name not in ALIKE), *TRANSFORMERS):
            console.print(name, highlight=False)
            content["models"][name] = record(name, Path(folder))
            write_results(options.out, content)
    return content


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 2 where the results file cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m bench.backbones", description=__doc__.splitlines()[0])
    return run_or_print(parser, argv, OUT, measure=measure, tables=tables, markdown=markdown)


if __name__ == "__main__":
    sys.exit(main())
