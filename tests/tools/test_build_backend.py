"""What an installation asks for and says; building itself is what installing for these tests has done."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vtp
from tools import build_backend

ROOT = Path(__file__).parents[2]


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.delenv("VTP_BUILD_CPP", raising=False)
    return build_backend


def test_a_build_beside_an_installed_pytorch_downloads_none(backend):
    assert backend.find_torch() == Path(torch.__file__).parent
    assert backend.build_requirements() == []


def test_a_build_without_pytorch_asks_for_one_whose_stable_abi_the_operators_use(backend, monkeypatch):
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    monkeypatch.setattr(backend, "find_compiler", lambda: "c++")
    assert backend.build_requirements() == ["torch>=2.10"]
    assert "torch>=2.10" in backend.get_requires_for_build_wheel()
    assert "torch>=2.10" in backend.get_requires_for_build_editable()


def test_a_wheel_has_no_module_of_an_earlier_build(backend, tmp_path, monkeypatch):
    from setuptools import build_meta

    stale = tmp_path / "build" / "lib" / "vtp" / "engine.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build_meta, "build_wheel", lambda *arguments: str(stale.exists()))
    assert backend.build_wheel("out") == "False"


@pytest.mark.parametrize(
    "prepare, says",
    [
        (lambda patch, backend: patch.setenv("VTP_BUILD_CPP", "0"), "VTP_BUILD_CPP=0"),
        (lambda patch, backend: patch.setattr(backend, "find_compiler", lambda: None), "no C\\+\\+ compiler"),
    ],
    ids=["asked", "no-compiler"],
)
def test_a_pure_python_build_asks_for_no_pytorch_and_says_why(backend, monkeypatch, prepare, says):
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    prepare(monkeypatch, backend)
    assert re.search(says, backend.why_pure_python())
    assert backend.build_requirements() == []


def test_an_older_pytorch_is_not_built_with(backend, tmp_path):
    (tmp_path / "include/torch/csrc/stable").mkdir(parents=True)
    for version, enough in (("2.9.1", False), ("2.10.0a0", True), ("3.0.0", True)):
        (tmp_path / "version.py").write_text(f"__version__ = '{version}+cpu'\n")
        assert backend._is_new_enough(tmp_path) is enough, version


def test_the_version_is_a_literal_that_a_build_can_read_without_importing_pytorch():
    text = (ROOT / "vtp/__init__.py").read_text()
    assert f'__version__ = "{vtp.__version__}"' in text


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86")
@pytest.mark.skipif(build_backend.find_compiler() is None, reason="there is no C++ compiler")
def test_a_compiler_that_does_not_know_amx_builds_the_rest_and_that_is_said(tmp_path):
    old = tmp_path / "old"
    command = build_backend.find_compiler()
    old.write_text(f'#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec {command} "$@"\n')
    old.chmod(0o755)
    said = {}
    for compiler in (command, str(old)):
        run = subprocess.run(
            [sys.executable, "setup.py", "--version"],
            cwd=ROOT, env=os.environ | {"CXX": compiler}, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        said[compiler] = run.stderr
    assert "vtp: amx_bf16.cpp left out" in said[str(old)] and "left out" not in said[command]
    # What is built then asks for no kernels that are not there.
    source = ROOT / "csrc" / "cpu" / "instruction_sets.cpp"
    symbols = tmp_path / "sets.s"
    flags = ["-std=c++17", "-DVTP_WITHOUT_AMX", "-S", str(source), "-o", str(symbols)]
    subprocess.run([*command.split(), *flags], check=True)
    assert "kAvx512Bf16" in symbols.read_text() and "kAmxBf16" not in symbols.read_text()
