import copy
import json
import re

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile kernels with")

from tests.support import aot_kernels
from tests.support.aot_kernels import broken, double, gemm
from tests.support.processes import forks
from vtp_kernels.proofs import compilations
from vtp_kernels.proofs.disassembly import KB, occupancy, read_gcn, read_sass, tensor_families

SMALL = {"blocks": (64, 64, 32), "num_warps": 4}


@pytest.fixture(scope="module")
def good():
    record = compilations.compile_variant(gemm("gemm", **SMALL), "sm_90")
    assert "error" not in record
    return record


# ---- the rules, on real compilations ----


@pytest.mark.parametrize(
    ("target", "family", "registers"),
    [
        ("sm_80", "HMMA.F32.BF16", 255),
        ("sm_90", "HGMMA.F32.BF16", 255),
        ("sm_100", "UTCHMMA", 255),
        ("sm_120", "HMMA.F32.BF16", 255),
        ("gfx942", "v_mfma_f32_bf16", 512),
    ],
)
def test_a_plain_gemm_passes_on_every_target(target, family, registers):
    record = compilations.compile_variant(gemm("gemm", **SMALL), target)
    assert compilations.violations(record) == []
    assert set(tensor_families(record["tensor"])) == {family}
    assert 0 < record["registers"] <= registers
    assert record["load_width"] == 16 and record["wide_loads"] == 100
    assert record["blocks"] >= 1 and record["threads"] == 4 * (64 if target == "gfx942" else 32)
    assert record["fp64"] == record["local_accesses"] == 0 and record["code_bytes"] > 1000


def test_descriptors_load_by_tma_where_the_chip_has_it_and_are_caught_where_it_has_not():
    variant = gemm("descriptors", descriptors=True, blocks=(128, 128, 64))
    record = compilations.compile_variant(variant, "sm_90")
    assert compilations.violations(record) == []
    assert set(record["loads"]) == {"tma"} and record["load_width"] == 16

    spills, loads = compilations.violations(compilations.compile_variant(variant, "sm_80"))
    assert re.fullmatch(
        r"spills: \d+ accesses to \d+ bytes of local memory per thread, expected none", spills
    )
    assert re.fullmatch(r"loads: mostly 2 bytes \(2:\d+\), expected 16 or TMA", loads)


def test_a_tile_too_large_for_its_warps_spills():
    record = compilations.compile_variant(gemm("spill", blocks=(64, 128, 32), num_warps=1), "sm_90")
    assert [text.split(":")[0] for text in compilations.violations(record)] == ["spills"]
    assert record["registers"] == 255 and record["spill_bytes"] > 0


def test_a_product_that_misses_the_matrix_cores_is_caught_unless_it_is_meant_to():
    ieee = {"dtype": "fp32", "precision": "ieee", **SMALL}
    record = compilations.compile_variant(gemm("ieee", **ieee), "sm_80")
    assert compilations.violations(record) == ["matrix cores: no such instruction, expected some"]
    assert compilations.violations(record | {"dot": "fma"}) == []


def test_narrow_loads_are_caught_where_wide_ones_are_promised():
    assert compilations.violations(compilations.compile_variant(double("double"), "sm_90")) == []
    assert (
        compilations.violations(compilations.compile_variant(double("double", promised=False), "sm_90")) == []
    )
    record = compilations.compile_variant(double("double", aligned=False), "sm_90")
    assert compilations.violations(record) == ["loads: mostly 2 bytes (2:8), expected 16 or TMA"]


def test_too_much_shared_memory_is_caught():
    record = compilations.compile_variant(
        gemm("large", blocks=(64, 64, 128), num_stages=6, num_warps=8), "sm_120"
    )
    (text,) = compilations.violations(record)
    assert re.fullmatch(r"shared memory: 1\d\d,\d{3} bytes, expected at most 101,376", text)
    assert record["blocks"] == record["occupancy"] == 0


def test_a_failing_compilation_is_a_record_with_the_compilers_message():
    (text,) = compilations.violations(compilations.compile_variant(broken("broken"), "sm_90"))
    assert text == "does not compile: CompilationError: arange's range must be a power of 2"


def test_a_variant_that_does_not_fit_its_kernel_is_named():
    variant = double("double")
    del variant.signature["n"]
    (text,) = compilations.violations(compilations.compile_variant(variant, "sm_90"))
    assert "arguments without a type or value: ['n']" in text


# ---- the rules, one at a time ----


def test_a_stack_frame_without_accesses_is_no_spill(good):
    assert compilations.violations(good | {"spill_bytes": 16}) == []
    assert "spills: 2 accesses" in compilations.violations(good | {"spill_bytes": 8, "local_accesses": 2})[0]
    assert compilations.violations(good | {"scalar_spills": 3}) == [
        "spills: 3 scalar registers, expected none"
    ]


def test_a_block_that_fits_nowhere_is_caught(good):
    (text,) = compilations.violations(good | {"blocks": 0, "threads": 1024, "registers": 128})
    assert text.startswith("occupancy: no block of 1024 threads with 128 registers fits")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"registers": 9}, "registers: {}, baseline {}"),
        ({"occupancy": -1}, "occupancy: {}%, baseline {}%"),
        ({"shared": 1024}, "shared memory: {:,} bytes, baseline {:,} bytes"),
        ({"fp64": 1}, "float64 instructions: {}, baseline {}"),
        ({"load_width": -8}, "width of most loads: {} bytes, baseline {} bytes"),
        ({"wide_loads": -50}, "bytes by wide loads: {}%, baseline {}%"),
        ({"store_width": -8}, "width of most stores: {} bytes, baseline {} bytes"),
        ({"wide_stores": -50}, "bytes by wide stores: {}%, baseline {}%"),
    ],
)
def test_what_got_worse_is_a_regression_and_what_got_better_is_not(good, change, text):
    ((field, amount),) = change.items()
    worse = good | {field: good[field] + amount}
    assert compilations.regressions(worse, good) == [text.format(worse[field], good[field])]
    assert compilations.regressions(good, worse) == []


def test_what_is_not_worth_a_word_is_not_reported(good):
    assert compilations.regressions(good, good) == []
    assert compilations.regressions(good | {"registers": good["registers"] + 8, "code_bytes": 1}, good) == []
    assert compilations.regressions(good | {"tensor": {"HGMMA.64x256x16.F32.BF16": 9}}, good) == []
    assert (
        compilations.regressions({"error": "no"}, good)
        == compilations.regressions(good, {"error": "no"})
        == []
    )


def test_other_matrix_instructions_or_weaker_requirements_are_regressions(good):
    tensor = {"HMMA.16816.F32.BF16": 1}
    changed = compilations.regressions(good | {"tensor": tensor, "dot": None, "aligned": False}, good)
    assert changed == [
        "matrix cores: HMMA.F32.BF16, baseline HGMMA.F32.BF16",
        "dot: None, baseline tensor_core",
        "tiles: no longer aligned, baseline aligned",
    ]


# ---- reading machine code, and occupancy ----


def test_instructions_are_counted_by_what_they_do():
    found = read_sass(
        """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR8][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR8][R2.64] ;
        /*0030*/                   LDG.E.U16 R4, desc[UR8][R2.64] ;
        /*0040*/                   LDG.E R4, desc[UR8][R2.64] ;
        /*0050*/             @UPT  UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*0060*/              @P12 STG.E.64 desc[UR8][R2.64], R4 ;
        /*0070*/                   LDL.LU R4, [R1+0x4] ;
        /*0080*/                   STL.64 [R1], R4 ;
        /*0090*/                   DFMA R2, R4, R6, R8 ;
        /*00a0*/                   F2F.F64.F32 R2, R4 ;
        /*00b0*/                   LDS.128 R4, [R2] ;
        /*00c0*/                   LDGDEPBAR ;
        /*00d0*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        """
    )
    assert found["loads"] == {16: 2, 2: 1, 4: 1, "tma": 1} and found["stores"] == {8: 1}
    assert found["local_accesses"] == 2 and found["fp64"] == 2 and found["code_bytes"] == 14 * 16
    assert found["tensor"] == {"HMMA.16816.F32": 1}

    found = read_gcn(
        """
        s_load_dwordx4 s[0:3], s[4:5], 0x0
        global_load_dwordx4 v[0:3], v4, s[0:1]
        buffer_load_dwordx2 v[0:1], v4, s[0:3], 0 offen
        global_load_ushort v0, v4, s[0:1]
        global_load_short_d16_hi v0, v4, s[0:1]
        global_store_dword v4, v0, s[0:1]
        scratch_store_dword off, v0, s32
        v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
        v_fma_f64 v[0:1], v[2:3], v[4:5], v[6:7]
        """
    )
    assert found["loads"] == {16: 1, 8: 1, 2: 2} and found["stores"] == {4: 1}
    assert found["local_accesses"] == found["fp64"] == 1
    assert found["tensor"] == {"v_mfma_f32_32x32x8_bf16": 1}


@pytest.mark.parametrize(
    ("target", "threads", "registers", "shared", "expected"),
    [
        ("sm_80", 128, 64, 48 * KB, (3, 18)),  # shared memory: 49 KB each of 164
        ("sm_80", 256, 128, 0, (2, 25)),  # registers: 4 warps per partition
        ("sm_80", 32, 16, 0, (32, 50)),  # blocks per SM
        ("sm_80", 1024, 65, 0, (0, 0)),  # 72 registers: 7 warps per partition, 32 are needed
        ("sm_90", 128, 168, 0, (3, 18)),  # 3 warps per partition
        ("sm_90", 384, 168, 200 * KB, (1, 18)),
        ("sm_90", 128, 32, 113 * KB, (2, 12)),  # exactly twice 114 KB
        ("sm_90", 128, 32, 113 * KB + 1, (1, 6)),
        ("sm_90", 128, 32, 227 * KB, (1, 6)),
        ("sm_90", 128, 32, 227 * KB + 1, (0, 0)),
        ("sm_120", 128, 40, 0, (12, 100)),  # 48 warps
        ("sm_120", 32, 16, 0, (24, 50)),
        ("sm_120", 128, 32, 99 * KB, (1, 8)),
        ("gfx942", 256, 64, 0, (8, 100)),
        ("gfx942", 256, 84, 0, (5, 62)),  # 88 registers: 5 waves per SIMD
        ("gfx942", 512, 84, 0, (2, 50)),
        ("gfx942", 256, 512, 0, (1, 12)),
        ("gfx942", 256, 64, 32 * KB, (2, 25)),
        ("gfx942", 256, 64, 64 * KB + 4, (0, 0)),
    ],
)
def test_occupancy_is_that_of_the_vendors_calculator(target, threads, registers, shared, expected):
    assert occupancy(target, threads, registers, shared) == expected


def test_tensor_memory_limits_the_blocks_of_sm_100():
    assert occupancy("sm_100", 128, 64, 32 * KB) == (6, 37)
    assert occupancy("sm_100", 128, 64, 32 * KB, tensor_memory=256) == (2, 12)


def test_amd_occupancy_agrees_with_the_compilers_own():
    for variant in (gemm("gemm"), double("double")):
        code = compilations.compile_for(variant, "gfx942").asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
        waves_per_simd = int(re.search(r"; Occupancy: (\d+)", code)[1])
        assert occupancy("gfx942", 256, registers, 0)[0] == waves_per_simd


# ---- files and commands ----


@pytest.fixture
def toy(monkeypatch):
    """The toy op in place of the package's."""
    monkeypatch.setattr(compilations, "OPS", {"toy": "tests.support.aot_kernels"})
    compilations._variants.cache_clear()
    yield
    compilations._variants.cache_clear()


@pytest.fixture
def compiled(toy, monkeypatch, good):
    """Records that `check` gets in place of compilations; a test may change them."""
    records = {
        task.key: good | {"target": task.target, "op": task.op, "name": task.name}
        for task in compilations.tasks(compilations.TARGETS, ["toy"])
    }

    def compile_all(chosen, jobs):
        return {task.key: copy.deepcopy(records[task.key]) for task in chosen}

    monkeypatch.setattr(compilations, "compile_all", compile_all)
    return records


def test_a_report_is_written_whole_one_variant_a_line_and_read_back(good, tmp_path):
    path = tmp_path / "report.json"
    records = [good | {"name": name} for name in ("b", "a")]
    compilations.save(path, records)
    first = path.read_bytes()
    compilations.save(path, reversed(records))
    assert path.read_bytes() == first and list(tmp_path.iterdir()) == [path]

    versions, loaded = compilations.load(path)
    assert versions == compilations.versions() and {"triton", "ptxas", "vtp"} <= versions.keys()
    assert list(loaded) == ["sm_90 toy/a", "sm_90 toy/b"] and loaded["sm_90 toy/a"] == records[1]
    lines = path.read_text().splitlines()
    assert [json.loads(line.rstrip(","))["name"] for line in lines[2:-1]] == ["a", "b"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(good, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compilations.os, "replace", fail)
    with pytest.raises(compilations.CompilationError, match=r"cannot write .*No space left"):
        compilations.save(path, [good])
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.thorough  # so it does, and for longer
def test_report_then_check_compile_in_other_processes_and_agree(toy, tmp_path, capsys):
    path = tmp_path / "report.json"
    chosen = ["--targets", "sm_80", "--jobs", "1"]
    assert compilations.main(["report", *chosen, "--out", str(path)]) == 0
    assert "sm_80: 4 variants, 0 do not compile, 0 spill" in capsys.readouterr().out
    assert len(compilations.load(path)[1]) == 4
    assert compilations.main(["check", *chosen, "--baseline", str(path)]) == 0
    assert "4 of 4 variants compiled, 0 failures" in capsys.readouterr().out


@pytest.mark.thorough  # starts processes that import PyTorch, five times
def test_a_crash_of_the_compiler_is_one_failure_among_results(toy, monkeypatch):
    monkeypatch.setenv("AOT_TROUBLE", "1")
    records = compilations.compile_all(compilations.tasks(["sm_80"], ["toy"]), jobs=2)
    errors = {record["name"]: record["error"] for record in records.values() if "error" in record}
    assert errors == {"crash": "the compiler crashed"}
    assert len(records) == 5


def test_only_a_whole_report_becomes_the_baseline(compiled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compilations, "BASELINE", tmp_path / "baseline.json")
    for part in (["--targets", "sm_80"], ["--only", "bf16"]):
        assert compilations.main(["report", *part]) == 0
        assert "Not written" in capsys.readouterr().out and not compilations.BASELINE.exists()
    assert compilations.main(["report"]) == 0
    assert len(compilations.load(compilations.BASELINE)[1]) == 4 * len(compilations.TARGETS)


def test_check_names_what_is_new_gone_worse_and_wrong(compiled, tmp_path, capsys):
    path = tmp_path / "baseline.json"
    check = ["check", "--baseline", str(path)]
    gone = next(iter(compiled.values())) | {"name": "old"}
    new = "gfx942 toy/double-bf16"
    compilations.save(path, [*(record for name, record in compiled.items() if name != new), gone])
    compiled["sm_90 toy/double-bf16"]["registers"] += 20
    compiled["sm_120 toy/double-fp16"]["local_accesses"] = 7
    compiled["sm_100 toy/double-fp16"]["dot"] = "tensor_core"

    assert compilations.main(check) == 1
    out = capsys.readouterr().out
    assert "sm_80 toy/old: in the baseline, but gone" in out and f"{new}: new, not in the baseline" in out
    assert "sm_90 toy/double-bf16: registers:" in out and "sm_120 toy/double-fp16: spills: 7 accesses" in out
    assert "20 of 20 variants compiled, 4 failures" in out


def test_another_triton_makes_regressions_notes_and_violations_stay(compiled, tmp_path, capsys):
    path = tmp_path / "baseline.json"
    compilations.save(path, compiled.values())
    path.write_text(
        path.read_text().replace(f'"triton": "{compilations.versions()["triton"]}"', '"triton": "1.0"')
    )
    compiled["sm_90 toy/double-bf16"]["registers"] += 20
    assert compilations.main(["check", "--baseline", str(path)]) == 0
    out = capsys.readouterr().out
    assert "baseline is of Triton 1.0" in out and "note: sm_90 toy/double-bf16: registers" in out
    compiled["sm_90 toy/double-bf16"]["local_accesses"] = 1
    assert compilations.main(["check", "--baseline", str(path)]) == 1


def test_quick_has_every_kernel_target_and_type(toy):
    everything = compilations.tasks(compilations.TARGETS, ["toy"])
    worst = {"sm_80 toy/double-fp16-unaligned": {"registers": 99}}
    chosen = compilations.quick(everything, worst)
    assert chosen == compilations.quick(list(reversed(everything)), worst)
    assert "sm_80 toy/double-fp16-unaligned" in {task.key for task in chosen}
    assert len(chosen) < len(everything)
    for target in compilations.TARGETS:
        names = " ".join(task.name for task in chosen if task.target == target)
        assert "bf16" in names and "fp16" in names and "unaligned" in names


def test_two_variants_of_one_name_are_an_error(toy, monkeypatch):
    monkeypatch.setattr(aot_kernels, "variants", lambda target: [double("a"), double("a")])
    with pytest.raises(compilations.CompilationError, match="two variants for sm_80 are called a"):
        compilations._variants("tests.support.aot_kernels", "sm_80")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--baseline", "missing.json"], "no baseline at missing.json"),
        (["check", "--baseline", __file__], "is not a report"),
        (["report", "--only", "no such thing"], "no variant has 'no such thing' in its name"),
        (["report", "--out", "missing/report.json"], "cannot write missing"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(compiled, arguments, message, capsys):
    assert compilations.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["", "check --targets sm_1", "check --jobs 0", "report --ops x"])
def test_bad_arguments_end_with_2(arguments):
    with pytest.raises(SystemExit) as error:
        compilations.main(arguments.split())
    assert error.value.code == 2


def test_without_triton_or_with_its_interpreter_nothing_is_compiled(toy, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compilations.main(["check"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    monkeypatch.setattr(compilations, "HAS_TRITON", False)
    assert compilations.main(["report"]) == 2
    assert "Triton is not installed" in capsys.readouterr().err


def one_of_each_kernel(chosen, baseline):
    """The one of the least code, as it compiles soonest, that loads widely and computes on matrix cores."""
    taken = {}

    def order(task):
        record = baseline[task.key]
        return -record["load_width"], not record["tensor"], record["code_bytes"], task

    for task in sorted((task for task in chosen if task.key in baseline), key=order):
        variant = compilations._variants(task.module, task.target)[task.name]
        taken.setdefault((task.op, variant.kernel.__name__), task)
    return sorted(taken.values())


def test_every_kernel_compiles_as_in_the_committed_report(monkeypatch, capsys):
    monkeypatch.setattr(compilations, "quick", one_of_each_kernel)
    context = forks()  # processes that need not import PyTorch and Triton first
    monkeypatch.setattr(compilations.multiprocessing, "get_context", lambda method: context)
    chosen = ["--targets", "sm_90", "--jobs", "1"]
    assert compilations.main(["check", "--quick", *chosen]) == 0, capsys.readouterr().out


@pytest.mark.thorough
def test_every_kernel_compiles_for_every_type_and_constant_as_in_the_committed_report(capsys):
    # One target: all five would take a quarter of an hour where nothing has been compiled yet.
    assert compilations.main(["check", "--quick", "--targets", "sm_90"]) == 0, capsys.readouterr().out


def test_the_committed_report_has_every_compilation_and_none_that_is_wrong():
    _, records = compilations.load(compilations.BASELINE)
    assert set(records) == {task.key for task in compilations.tasks(compilations.TARGETS, compilations.OPS)}
    assert [
        (name, text) for name, record in records.items() for text in compilations.violations(record)
    ] == []
