"""The report of `python -m benchmarks gpu`: its steps, its budget, its page."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_benchmarks import only

from benchmarks import __main__ as cli
from benchmarks.commands import gpu


def test_the_gpu_report_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def some_steps(device: str, out: Path, quick: bool) -> list[gpu.Step]:
        python = [sys.executable, "-c"]
        return [
            gpu.Step("Long", [*python, "print(*range(1000), sep='\\n')"]),
            gpu.Step("Broken", [*python, "raise SystemExit('it broke')"]),
            gpu.Step("Absent", ["no-such-program"]),
            gpu.Step("Last", [*python, "print('reached')"]),
        ]

    monkeypatch.setattr(gpu, "steps", some_steps)
    assert cli.main(["gpu", "--device", "cpu", "--out", str(tmp_path)]) == 1
    page = only(tmp_path, "gpu-*.md").read_text()
    assert str(only(tmp_path, "gpu-*.md")) in capsys.readouterr().out
    for said in ("| Long | ok |", "| Broken | FAILED with 1 |", "it broke", "no-such-program", "\nreached\n"):
        assert said in page
    assert "[600 lines left out]" in page
    assert "\n999\n" in page


@pytest.mark.slow
def test_a_budget_ends_steps_with_their_children_and_leaves_the_rest_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(6); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; print('began', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"

    def some_steps(device: str, out: Path, quick: bool) -> list[gpu.Step]:
        return [
            gpu.Step("Short", [sys.executable, "-c", "print('done')"]),
            gpu.Step("Hangs", [sys.executable, "-c", parent]),
            gpu.Step("Never", [sys.executable, "-c", "print('reached')"]),
        ]

    monkeypatch.setattr(gpu, "budgeted_steps", some_steps)
    monkeypatch.setattr(gpu, "_LEAST_SECONDS", 1)
    start = time.perf_counter()
    assert cli.main(["gpu", "--device", "cpu", "--budget", "3", "--out", str(tmp_path)]) == 1
    page = only(tmp_path, "gpu-*.md").read_text()
    for said in ("| Short | ok |", "| Hangs | out of time |", "\nbegan\n"):
        assert said in page
    assert "Never" not in page
    assert "Never: left out, no time" in capsys.readouterr().out
    time.sleep(max(8 - (time.perf_counter() - start), 0))
    assert not mark.exists()


@pytest.mark.parametrize("choose", [gpu.steps, gpu.budgeted_steps])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_command_of_the_gpu_report_is_one_that_exists(choose: Any, device: str, tmp_path: Path) -> None:
    for quick in (False, True):
        for part in choose(device, tmp_path, quick):
            if "-m" in part.command:
                module, *arguments = part.command[2:]
                assert importlib.util.find_spec(module)
                if module == "benchmarks":
                    cli.make_parser().parse_args(arguments)
