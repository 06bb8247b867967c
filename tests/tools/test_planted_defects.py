"""The defects that are planted: each has its place, and what cannot be told is not taken for caught."""

import pytest

from tools import planted_defects as tool


@pytest.mark.parametrize("defect", tool.DEFECTS, ids=lambda defect: f"{defect.file}: {defect.wrong}")
def test_a_defect_has_its_place(defect):
    text = (tool.ROOT / defect.file).read_text(encoding="utf-8")
    assert tool.planted(text, defect) != text


def test_a_paragraph_is_a_defect():
    text = "a.py: it is wrong\n-    one\n-\n-two\n+    three\n? tests -k 'a or b'\n! build\n"
    assert list(tool.defects(text)) == [
        tool.Defect("a.py", "    one\n\ntwo", "    three", "it is wrong", "tests -k 'a or b'", build=True)
    ]


@pytest.mark.parametrize(
    "text",
    ["a.py\n-b\n? c", "a.py: d\n+b\n? c", "a.py: d\n-b\n+e", "a.py: d\n-b\nf\n? c", "a.py: d\n-b\n? c\n! d"],
)
def test_a_paragraph_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match=r"'a.py.*got .*, expected lines -old"):
        list(tool.defects(text))


@pytest.mark.parametrize("texts", [["no_such_file"], ["training", "no_such_file"]])
def test_a_text_that_is_in_no_path_is_refused(texts, capsys):
    assert tool.main(texts) == 2
    assert "texts: got 'no_such_file', expected a part of one of bench/" in capsys.readouterr().err


@pytest.mark.parametrize(
    "status, output, expected",
    [
        (1, "FAILED tests/test_a.py::test_b - AssertionError", 0),
        (0, "3 passed", 1),
        (0, "1 passed, 2 skipped", 2),
    ],
)
def test_without_the_operators_a_skipped_test_has_caught_nothing_and_missed_nothing(
    status, output, expected, monkeypatch, capsys
):
    defect = tool.Defect("a.py", "right", "wrong", "it is wrong", "tests")

    def copy(folder):
        (folder / "a.py").write_text("right")

    monkeypatch.setattr(tool, "DEFECTS", [defect])
    monkeypatch.setattr(tool, "copy_of_the_tree", copy)
    monkeypatch.setattr(tool, "quick_lane", lambda folder, tests: (status, output))
    assert tool.main([]) == expected
    said = " ".join(capsys.readouterr().out.split())
    assert ("2 tests were skipped and vtp_kernels/_cpu.abi3.so is not built" in said) == (expected == 2)
