"""The option --out of the benchmarks: what cannot be written is found before anything is measured."""

import argparse
from pathlib import Path

import pytest

from bench import results_file
from vtp.files import FileError


def checked(*arguments):
    parser = argparse.ArgumentParser()
    results_file.add_results_file(parser, Path("results.json"))
    results_file.check_results_file(parser, parser.parse_args([str(a) for a in arguments]))


def test_a_folder_that_takes_no_files_is_refused_unless_the_file_is_only_read(tmp_path, monkeypatch, capsys):
    def refuse(path):
        raise FileError(f"path: cannot write into {path.parent}: Permission denied")

    file = tmp_path / "results.json"
    checked("--out", file)
    assert not list(tmp_path.iterdir()), "the check left a file"
    file.write_text("{}")
    monkeypatch.setattr(results_file, "refuse_unwritable", refuse)  # root may write anywhere
    checked("--out", file, "--markdown")
    with pytest.raises(SystemExit, match="2"):
        checked("--out", file)
    assert f"argument --out: path: cannot write into {tmp_path}" in capsys.readouterr().err


def test_a_missing_folder_and_a_missing_file_to_print_are_refused(tmp_path):
    for arguments in (["--out", tmp_path / "missing" / "a"], ["--out", tmp_path], ["--markdown"]):
        with pytest.raises(SystemExit, match="2"):
            checked(*arguments, *(["--out", tmp_path / "none"] if arguments == ["--markdown"] else []))
