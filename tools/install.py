"""`pip install` with a line every few seconds that says what it is doing: python tools/install.py ARGUMENTS

PyTorch is several gigabytes, and pip is silent while it downloads (without a terminal) and unpacks. What pip
itself prints is shown if it fails.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

SECONDS = 5.0  # between two lines
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))


def main(arguments: list[str]) -> int:
    """Run pip, say what it is doing; returns its exit code."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        lines: list[str] = []
        reader = threading.Thread(target=_read, args=(pip, lines), daemon=True)
        reader.start()
        while _runs(pip):
            print(f"  {time.monotonic() - start:4.0f} s  {_phase(lines)}", flush=True)
        reader.join()
    if pip.returncode:
        print("".join(lines), file=sys.stderr)
    return pip.returncode


def _read(pip: subprocess.Popen[str], lines: list[str]) -> None:
    for line in pip.stdout or ():
        lines.append(line)


def _runs(pip: subprocess.Popen[str]) -> bool:
    """Wait a few seconds, less if pip ends; whether it still runs."""
    try:
        pip.wait(SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _phase(lines: list[str]) -> str:
    """What pip is at, from the last of its lines that says so."""
    said = [line.strip() for line in lines if line.strip()]
    for line in reversed(said):
        if line.startswith("Installing collected packages"):
            return _unpacking()
        if line.startswith(("Downloading", "Collecting", "Using cached", "Processing")):
            verb, what = line.removeprefix("Using ").split()[:2]
            return f"{verb.lower()} {'-'.join(what.rpartition('/')[2].split('-')[:2])}"
        if line.startswith(("Building", "Created", "Installing build", "Getting", "Preparing")):
            return line.partition(": ")[0]
    return "starting"


def _unpacking() -> str:
    """The package that is being unpacked, and how much of it lies there."""
    try:
        folders = [
            path
            for path in SITE_PACKAGES.iterdir()
            if path.is_dir() and path.suffix != ".dist-info" and path.name != "__pycache__"
        ]
        newest = max(folders, key=lambda path: path.stat().st_mtime)
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    except (OSError, ValueError):  # pip also moves and removes, or has not begun
        return "unpacking"
    return f"unpacking {newest.name}: {size / 1e6:,.0f} MB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
