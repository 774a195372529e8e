"""profiling/gpu_report.py: its schedule, and what becomes of stages that go wrong."""
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import compare_gpu
import gpu_report as script
import pytest
from gpu_report import Stage

from cnn.cli import cli

PROVENANCE = {"commit": "abc", "date": "today", "command": "python profiling/-c",
              "gpu": {"name": "Fake GPU", "arch": "sm_90a", "driver_cuda": "13.0"}}
PASSING = "-c \"print('{output}'); print('..x 3 passed, 7 deselected in 0.1s'.partition(' ')[2])\""


@pytest.fixture
def report(monkeypatch, tmp_path, capsys):
    """Function (stages...) -> (exit status, report.json, report.md)."""
    monkeypatch.setattr(script, "probe", lambda: PROVENANCE)
    monkeypatch.setattr(script, "GRACE", 0.2)
    monkeypatch.setattr(sys, "argv", ["/home/me/profiling/gpu_report.py"])

    def run(*stages, seconds=60.0):
        monkeypatch.setattr(script, "schedule", lambda: list(stages))
        monkeypatch.setattr(script, "SECONDS", seconds)
        status = 0
        try:
            script.main(["--output", str(tmp_path)])
        except SystemExit as exit:
            status = exit.code
        text = (tmp_path / "report.md").read_text()
        assert text in capsys.readouterr().out
        return status, json.loads((tmp_path / "report.json").read_text()), text
    return run


PLACES = {"output": "o", "jobs": "2", "arch": "sm_90a", "json": "j"}
LINES = [line[1:] for stage in script.schedule()
         for line in stage.command_lines(PLACES, stage.share)]


def test_the_schedule_fits():
    stages = script.schedule()
    assert sum(stage.share for stage in stages) + script.GRACE <= script.SECONDS
    assert script.SECONDS <= 9 * 60 - 30        # to start, and to write the report
    assert all(stage.reserve < stage.share for stage in stages)
    names = [stage.name for stage in stages]
    assert names.index("build") < names.index("tests") < names.index("tune") < (
        names.index("compare_kernels"))


# The files of this checkout but networks.py, whose parser is no function; pytest knows its options.
UNDERSTOOD = [line for line in LINES if "pytest" not in line and line[0] != "profiling/networks.py"
              and (line[0] == "-m" or (script.ROOT / line[0]).exists())]


@pytest.mark.parametrize("line", UNDERSTOOD, ids=" ".join)
def test_commands_are_understood(line, monkeypatch):
    if line[:2] == ["-m", "cnn"]:
        cli.commands[line[2]].make_context(line[2], line[3:])
    elif line[0] == "-m":
        importlib.import_module(line[1]).main.make_context(line[1], line[2:])
    else:
        monkeypatch.setattr(sys, "argv", line)
        importlib.import_module(Path(line[0]).stem).parse_arguments()


def test_every_file_with_a_test_for_a_gpu_is_run():
    files = script.test_files()
    assert "tests/test_cuda_conv.py" in files
    assert "tests/test_roofline.py" not in files
    run = [line[-1] for line in LINES if line[1] == "pytest"]
    assert sorted(run) == files


def test_what_takes_all_memory_is_tested_alone():
    commands = {stage.name: stage.commands for stage in script.schedule()}
    alone, = commands["tests_alone"]
    assert alone.endswith("tests/test_gpu.py")
    assert len(commands["tests"]) > 15


def test_torch_compiles_in_a_mode_that_ends_in_time():
    """max-autotune takes minutes for one network."""
    line, = (line for line in LINES if line[0] == "profiling/compare_gpu.py")
    settings = compare_gpu.parse_arguments(line[1:])
    assert settings.compile_mode == "default"
    assert not [name for name in settings.engines if name.startswith("jax")]


def test_every_script_that_can_draw_draws():
    for line in LINES:
        if line[0].startswith("profiling/") and "--plot" in (script.ROOT / line[0]).read_text():
            drawn = Path(line[line.index("--plot") + 1])
            assert (drawn.parent.name, drawn.suffix) == ("o", ".svg")


def test_figures_and_logs_are_gathered(report, tmp_path):
    write = "import json; json.dump(dict(headline=dict(speed=1.25)), open('{json}', 'w'))"
    status, record, text = report(Stage("tests", 20, (PASSING, PASSING)),
                                  Stage("bench", 20, (f'-c "{write.format(json="{json}")}"',)),
                                  Stage("doctor", 10, ('-c "print(41); print(42)"',)))
    assert status == 0
    tests, bench, doctor = record["stages"]
    assert (tests["headline"], tests["outcome"]) == ({"passed": 6}, "passed")
    assert tests["statuses"] == [0, 0]
    assert bench["headline"] == {"speed": 1.25}
    assert doctor["headline"] == {"last line": "42"}
    assert "Fake GPU (sm_90a), driver for CUDA 13.0; commit abc" in text
    assert "- speed: 1.25" in text
    assert record["provenance"] == {**PROVENANCE, "command": "python profiling/gpu_report.py"}
    assert (tmp_path / "doctor.log").read_text().startswith("$ ")
    assert "\n41\n42\n" in (tmp_path / "doctor.log").read_text()
    assert not list(tmp_path.glob("*.part"))


def test_a_stage_that_fails_is_recorded_and_the_next_goes_on(report):
    status, record, text = report(Stage("broken", 20, ('-c "raise SystemExit(3)"',)),
                                  Stage("tests", 20, (PASSING,)))
    assert status == 0
    assert [stage["outcome"] for stage in record["stages"]] == ["failed", "passed"]
    assert record["stages"][0]["statuses"] == [3]
    assert "- failed: see broken.log" in text


def test_figures_that_are_torn_end_no_report(report):
    """Of a stage that was ended while it wrote them."""
    torn = "print('halfway'); open('{json}', 'w').write('{{')"
    _, record, _ = report(Stage("torn", 20, (f'-c "{torn}"',)), Stage("tests", 20, (PASSING,)))
    assert [stage["headline"] for stage in record["stages"]] == [{"last line": "halfway"},
                                                                 {"passed": 3}]


def test_a_stage_that_hangs_is_cut_off_with_its_children(report, tmp_path):
    """It ignores the request to end, and has a child."""
    hang = tmp_path / "hang.py"
    hang.write_text("import signal, subprocess, sys, time\n"
                    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                    "child = subprocess.Popen([sys.executable, '-c', 'import time; "
                    "time.sleep(60)'])\n"
                    "print(child.pid, flush=True)\ntime.sleep(60)\n")
    status, record, _ = report(Stage("hang", 5, (str(hang),)), Stage("tests", 9, (PASSING,)),
                               seconds=15)
    assert status == 0
    assert [stage["outcome"] for stage in record["stages"]] == ["cut off", "passed"]
    child = int(record["stages"][0]["headline"]["last line"])
    for _ in range(100):
        if not is_running(child):
            break
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_all_that_are_late_are_asked_to_end_before_any_is_waited_for(monkeypatch):
    log = []

    class Late:
        returncode = None

        def __init__(self, pid):
            self.pid = pid

        def wait(self, timeout=None):
            if timeout is None:
                return
            log.append(("wait", self.pid))
            raise subprocess.TimeoutExpired("late", timeout)
    monkeypatch.setattr(script.os, "killpg", lambda pid, what: log.append((what.name, pid)))
    assert script.wait([Late(1), Late(2)], 0.0) == [None, None]
    assert log == [(what, pid) for what in ("wait", "SIGTERM", "wait", "SIGKILL") for pid in (1, 2)]


@pytest.mark.parametrize("name", script.TESTS)
@pytest.mark.parametrize("tests", [
    (PASSING, '-c "raise SystemExit(1)"'),          # one failed
    ('-c "raise SystemExit(5)"',),                  # there was none
    ("-c \"print('3 skipped in 0.1s')\"",),         # none could run
    ('-c "import time; time.sleep(60)"',),          # they did not end in time
])
def test_tests_that_did_not_pass_make_the_status(report, tests, name):
    status, record, _ = report(Stage(name, 2, tests), seconds=3)
    assert status == 1
    assert record["stages"][0]["outcome"] in ("failed", "cut off")


def test_time_that_is_left_over_goes_to_later_stages(report):
    stages = [Stage("quick", 20, ('-c "1"',)), Stage("tests", 10, (PASSING,)),
              Stage("bench", 10, ('-c "print({budget})"',), reserve=4)]
    record = report(*stages, seconds=45)[1]
    limits = [stage["limit"] for stage in record["stages"]]
    assert limits[0] == pytest.approx(24.8, abs=0.5)        # 45 less the later shares and GRACE
    assert limits[1] > limits[0] > limits[1] - 24.8         # its own 10 and what is left of 20
    budget = float(record["stages"][2]["commands"][0].partition("print(")[2].partition(")")[0])
    assert budget == round(limits[2] - 4)


def test_a_dry_run_prints_the_schedule_and_writes_nothing(tmp_path, capsys):
    script.main(["--dry-run", "--output", str(tmp_path / "none")])
    shown = capsys.readouterr().out
    assert "-m kernels.cuda.build --jobs" in shown
    assert f"of {script.SECONDS}" in shown
    assert not (tmp_path / "none").exists()


def test_without_a_gpu_a_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "PROBE", "raise SystemExit('the driver sees no GPU')")
    with pytest.raises(SystemExit, match="gpu_report: no GPU can be used: the driver sees no GPU"):
        script.main(["--output", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
