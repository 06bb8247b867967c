"""From transformers to ONNX, at toy size."""

import re
import runpy

import numpy as np
import pytest

from tests.examples.test_prune_deit import EXAMPLES

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(EXAMPLES / "transformers_to_onnx.py"))["main"]


def test_the_example_cuts_a_checkpoint_to_its_budget_and_writes_onnx(main, tmp_path, capsys):
    out = tmp_path / "small.onnx"
    main(["--toy", "--images", "64", "--out", str(out)])
    printed = capsys.readouterr().out
    same = re.search(r"^ViTForImageClassification: .*; in timm its logits differ by (.*)$", printed, re.M)
    assert float(same[1]) < 1e-5
    macs = [float(each) for each in re.findall(r"([\d.]+)M MACs", printed)]
    assert 0.4 < macs[1] / macs[0] <= 0.5
    assert float(re.search(r"^wrote .* ONNX Runtime's error (.*)$", printed, re.M)[1]) < 1e-5
    session = onnxruntime.InferenceSession(out)
    images = np.zeros((3, 3, 32, 32), np.float32)
    assert session.run(None, {"images": images})[0].shape == (3, 10)


def test_the_example_asks_for_images_and_for_a_file_that_can_be_written(main, tmp_path, capsys):
    for arguments, message in (
        (["--out", tmp_path / "small.onnx"], "--data: name a folder"),
        (["--toy", "--out", tmp_path], f"--out: got {tmp_path}, expected a file"),
    ):
        with pytest.raises(SystemExit):
            main([str(argument) for argument in arguments])
        assert message in capsys.readouterr().err
