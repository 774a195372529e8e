"""What the scripts share: types of options, where figures come from, how JSON is written."""
from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("numpy", "numba", "onnx", "onnxruntime", "openvino", "torch", "numba-cnn")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def provenance() -> dict[str, Any]:
    """What one must know to judge or repeat the figures; it names no folder of this machine."""
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command_line(),
            "environment": environment(),
            "commit": git_commit(),
            "cpu": cpu_name(),
            "cores": cores(),
            "system": f"{platform.system()} {platform.machine()}",
            "versions": {"python": platform.python_version(),
                         **{package: version(package) for package in PACKAGES}}}


def command_line() -> str:
    """This process's."""
    options = [Path(each).name if Path(each).is_absolute() else each for each in sys.argv[1:]]
    return shlex.join(["python", f"profiling/{Path(sys.argv[0]).name}", *options])


def environment() -> dict[str, str]:
    """Variables that say what engines compile for and choose."""
    return {name: value for name, value in sorted(os.environ.items())
            if name.startswith(("CNN_", "NUMBA_CPU_", "ONEDNN_")) and "/" not in value}


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The checkout's commit, with "-dirty" where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40",
               "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, record: dict[str, Any], indent: int | None = 1) -> None:
    """Beside it first: a process may be ended while it writes, and `path` is whole all the same."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(record, indent=indent) + "\n")
    os.replace(part, path)
