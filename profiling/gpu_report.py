"""What a GPU can say of this checkout in less than nine minutes, by one command.

    python -m pip install --editable '.[cuda13,test,peers]'
    python profiling/gpu_report.py --output report

Stage by stage: is the GPU seen, compile the kernels, run the tests that need a GPU, classify a
photo, search for the best tiles, and measure whole networks, kernels and layers. Each stage is a
process with a limit of its own; what it prints goes to STAGE.log and what it measures to
STAGE.json. One that fails or is cut off is recorded, and the next one goes on, with the time that
is left over. In the end report.md and report.json sum up.
The exit status is 1 where a test failed, or time was up before all had run.

Left out are JAX, whose compiler nothing can interrupt, and torch.compile's max-autotune, which
takes minutes for one network; `compare_gpu.py` measures both.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import command_line, write_json

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 510               # until the last stage has ended; the report is written after that
GRACE = 5                   # seconds between asking a stage to end and ending it
TESTS = ("tests", "tests_alone")
ALONE = ("tests/test_gpu.py",)      # it takes nearly all of the GPU's memory
NO_TESTS = 5                # pytest's status where a file has no test that needs a GPU
PROBE = ("import sys; sys.path.insert(0, 'profiling'); import gpu_timing, json; "
         "print(json.dumps(gpu_timing.provenance(0)))")


@dataclass(frozen=True)
class Stage:
    """share: seconds that it is sure to have. reserve: of those, how many are no part of the
    {budget} that its command is told. commands run at the same time."""
    name: str
    share: float
    commands: tuple[str, ...]
    reserve: float = 0

    def command_lines(self, places: dict[str, str], limit: float) -> list[list[str]]:
        budget = f"{max(1, limit - self.reserve):.0f}"
        return [[sys.executable, *shlex.split(command.format(**places, budget=budget))]
                for command in self.commands]


def test_files() -> list[str]:
    """Those with tests that a GPU can run."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py")
                  if re.search(r"\bmark\.gpu\b|\brunner\b", path.read_text()))


def schedule() -> list[Stage]:
    """In the order of what must be known first; files of tests wait for the compiler side by
    side."""
    classify = "-m cnn classify examples/cat.jpg --device cuda --dtype float16"
    tune = ("-m cnn tune {output}/resnet50.onnx --device cuda --dtype float16 "
            "--budget {budget}")
    dtypes = "--dtype float16 --dtype float32 --dtype bfloat16 --dtype tf32"
    rivals = ("--engines eager 'eager in a graph' compile 'compile in a graph' "
              "--compile-mode default")
    at_once, alone = (tuple(f"-m pytest -m gpu -q -p no:cacheprovider {file}" for file in files)
                      for files in (sorted({*test_files()}.difference(ALONE)), ALONE))
    return [
        Stage("doctor", 15, ("-m cnn doctor",)),
        Stage("build", 80, (f"-m kernels.cuda.build --jobs {{jobs}} --arch {{arch}} {dtypes}",)),
        Stage("tests", 80, at_once),
        Stage("tests_alone", 25, alone),
        Stage("classify_first", 12, (classify,)),
        Stage("classify_again", 8, (classify,)),
        Stage("resnet50", 15, ("profiling/networks.py resnet50 --output {output}/resnet50.onnx",)),
        Stage("tune", 50, (f"{tune} --batch 256",), reserve=15),
        Stage("tune_1", 30, (f"{tune} --batch 1",), reserve=10),
        Stage("compare_gpu", 100, (f"profiling/compare_gpu.py {rivals} --budget {{budget}} "
                                   "--json {json} --plot {output}/compare_gpu.svg",), reserve=20),
        Stage("compare_kernels", 65, ("profiling/compare_kernels.py --budget {budget} "
                                      "--json {json} --plot {output}/compare_kernels.svg",),
              reserve=20),
        Stage("layers", 25, ("profiling/layers.py {output}/resnet50.onnx --device cuda "
                             "--dtype float16 --batch 256 --runs 20 --json {json} "
                             "--plot {output}/layers.svg --trace {output}/layers_trace.json",)),
    ]


@dataclass
class Outcome:
    """What became of a stage. headline: its most important figures, by name."""
    name: str
    seconds: float
    limit: float
    outcome: str                    # "passed", "failed" or "cut off"
    commands: list[str]
    statuses: list[int | None]
    headline: dict[str, Any] = field(default_factory=dict)


# ---- running ----------------------------------------------------------------------------------

def run(stage: Stage, limit: float, places: dict[str, str], output: Path) -> Outcome:
    """Run a stage for `limit` seconds at most and read what it left behind."""
    result, log = output / f"{stage.name}.json", output / f"{stage.name}.log"
    result.unlink(missing_ok=True)      # of an earlier report
    lines = stage.command_lines({**places, "json": str(result)}, limit)
    start = time.monotonic()
    parts = [output / f"{stage.name}.{i}.part" for i in range(len(lines))]
    processes = [begin(line, part) for line, part in zip(lines, parts, strict=True)]
    statuses = wait(processes, start + limit)
    seconds = time.monotonic() - start
    with log.open("w") as file:
        for line, part in zip(lines, parts, strict=True):
            file.write(f"$ {shlex.join(line)}\n{part.read_text(errors='replace')}\n")
            part.unlink()
    found = headline(stage.name, result, log.read_text())
    if stage.name in TESTS:
        right = {0, NO_TESTS}.issuperset(statuses) and found.get("passed", 0) > 0
    else:
        right = set(statuses) == {0}
    outcome = "cut off" if None in statuses else "passed" if right else "failed"
    return Outcome(stage.name, seconds, limit, outcome, [shlex.join(line) for line in lines],
                   statuses, found)


def begin(line: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """In a session of its own, so that its children can be ended with it."""
    with log.open("wb") as file:
        return subprocess.Popen(line, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                stdin=subprocess.DEVNULL, start_new_session=True)


def wait(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    """Their exit statuses, None where one had to be ended: all of those at the same time."""
    late = [process for process in processes if not ends(process, deadline)]
    statuses = [None if process in late else process.returncode for process in processes]
    for process in late:
        with contextlib.suppress(ProcessLookupError):       # it has just ended
            os.killpg(process.pid, signal.SIGTERM)
    end = time.monotonic() + GRACE
    for process in late:
        ends(process, end)
    for process in late:
        with contextlib.suppress(ProcessLookupError):       # children that are left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return statuses


def ends(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Whether it has ended by then."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline - time.monotonic()))
    return process.returncode is not None


def headline(name: str, result: Path, log: str) -> dict[str, Any]:
    """The figures that a stage says are its most important ones; else how its output ends."""
    with contextlib.suppress(FileNotFoundError, ValueError):    # ValueError: the file is torn
        return json.loads(result.read_text()).get("headline", {})
    if name in TESTS:
        found: Counter[str] = Counter()
        for line in re.findall(r"^\d+ (?:passed|failed|skipped|error).* in \d.*s", log, re.M):
            found.update({what: int(n) for n, what in re.findall(r"(\d+) (\w+)", line)})
        return {what: count for what, count in found.items() if what != "deselected"}
    lines = [line for line in log.splitlines() if line.strip()]
    return {"last line": lines[-1].strip()} if len(lines) > 1 else {}


def probe() -> dict[str, Any]:
    """Commit, date, GPU; ValueError where none can be used."""
    found = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1:] or ["no reason was given"]
        raise ValueError(f"no GPU can be used: {reason[0]}")
    return json.loads(found.stdout)


def run_all(stages: Sequence[Stage], places: dict[str, str], output: Path,
            deadline: float) -> list[Outcome]:
    """Each stage has its share and what those before it left over."""
    outcomes = []
    for i, stage in enumerate(stages):
        later = sum(other.share for other in stages[i + 1:])
        limit = max(1.0, deadline - time.monotonic() - later - GRACE)
        print(f"{stage.name}: at most {limit:.0f} s", flush=True)
        outcomes.append(run(stage, limit, places, output))
        last = outcomes[-1]
        print(f"{stage.name}: {last.outcome} after {last.seconds:.0f} s", flush=True)
    return outcomes


# ---- summing up -------------------------------------------------------------------------------

def markdown(record: dict[str, Any]) -> str:
    about = record["provenance"]
    gpu = about["gpu"]
    lines = ["# GPU report", "",
             f"{gpu['name']} ({gpu['arch']}), driver for CUDA {gpu['driver_cuda']}; commit "
             f"{about['commit']}; {about['date']}; {record['seconds']:.0f} s in all.", "",
             "| stage | seconds | limit | outcome |", "|---|---:|---:|---|"]
    lines += ["| {name} | {seconds:.1f} | {limit:.0f} | {outcome} |".format(**stage)
              for stage in record["stages"]]
    for stage in record["stages"]:
        lines += ["", f"## {stage['name']}", ""]
        lines += [f"- {name}: {text(value)}" for name, value in stage["headline"].items()]
        if stage["outcome"] != "passed":
            lines += [f"- {stage['outcome']}: see {stage['name']}.log"]
    return "\n".join(lines) + "\n"


def text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(stages: Sequence[Stage], places: dict[str, str]) -> None:
    """The schedule, if no stage leaves anything over."""
    for stage in stages:
        print(f"{stage.name}, {stage.share:.0f} s")
        for line in stage.command_lines(places, stage.share):
            print(f"    {shlex.join(line)}")
    print(f"{sum(stage.share for stage in stages):.0f} s of {SECONDS}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_report"), metavar="DIR",
                        help="folder for logs and figures, default gpu_report")
    parser.add_argument("--dry-run", action="store_true", help="print the schedule, run nothing")
    settings = parser.parse_args(arguments)
    output = settings.output.resolve()
    places = {"output": str(output), "jobs": str(len(os.sched_getaffinity(0))), "arch": "ARCH",
              "json": f"{output}/STAGE.json"}
    if settings.dry_run:
        show(schedule(), places)
        return
    start = time.monotonic()
    try:
        found = probe()
        output.mkdir(parents=True, exist_ok=True)
        outcomes = run_all(schedule(), {**places, "arch": found["gpu"]["arch"]}, output,
                           start + SECONDS)
        record = {"kind": "measurement", "provenance": {**found, "command": command_line()},
                  "seconds": time.monotonic() - start,
                  "stages": [asdict(outcome) for outcome in outcomes]}
        write_json(output / "report.json", record)
        (output / "report.md").write_text(markdown(record))
    except (ValueError, OSError) as error:
        sys.exit(f"gpu_report: {error}")
    print((output / "report.md").read_text())
    if any(outcome.name in TESTS and outcome.outcome != "passed" for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
