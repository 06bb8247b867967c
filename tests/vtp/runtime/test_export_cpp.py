"""A .pt2 file compiled by AOTInductor runs in a C++ program, with neither Python nor this package in it."""

import copy
import shutil
import subprocess

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import vtp
from tests.support.models import FAMILIES, build, gated, image
from vtp.runtime.accuracy import relative_error
from vtp.runtime.export import export_pt2

# Reads images [batch, channels, height, width] as raw float32, writes what the model makes of them.
PROGRAM = r"""
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdlib>
#include <fstream>

int main(int argc, char** argv) {
  if (argc != 8) return 2;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  torch::Tensor images =
      torch::empty({std::atoi(argv[4]), std::atoi(argv[5]), std::atoi(argv[6]), std::atoi(argv[7])});
  std::ifstream(argv[2], std::ios::binary).read(static_cast<char*>(images.data_ptr()), images.nbytes());
  torch::Tensor outputs = model.run({images})[0].contiguous();
  std::ofstream(argv[3], std::ios::binary).write(static_cast<char*>(outputs.data_ptr()), outputs.nbytes());
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("program")
    (folder / "run.cpp").write_text(PROGRAM)
    command = [compiler, "-O1", "-std=c++20", "run.cpp", "-o", "run"]
    command += [f"-I{path}" for path in include_paths()]
    for path in library_paths():
        command += [f"-L{path}", f"-Wl,-rpath,{path}"]
    # What AOTInductor compiled asks for libtorch.so by name, which the program itself does not use.
    command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "run"


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["plain", "rotary"])
def test_a_pt2_file_runs_in_c_plus_plus(family, program, tmp_path):
    model = gated(build(FAMILIES[family], torch.float32))
    small = vtp.compact(model, vtp.make_plan(model, rate=0.4, min_keep=0))
    export_pt2(small, tmp_path / "small.pt2")
    package = torch._inductor.aoti_compile_and_package(
        torch.export.load(tmp_path / "small.pt2"), package_path=str(tmp_path / "small.aoti.pt2")
    )
    for batch in (1, 5):
        images = image(small, batch)
        images.numpy().tofile(tmp_path / "images")
        arguments = [package, "images", "outputs", *map(str, images.shape)]
        subprocess.run([program, *arguments], cwd=tmp_path, check=True)
        got = torch.from_numpy(np.fromfile(tmp_path / "outputs", np.float32)).view(batch, -1)
        assert relative_error(got, copy.deepcopy(small).double()(images.double())) <= 1e-5
