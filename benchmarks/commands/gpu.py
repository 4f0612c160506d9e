"""``gpu``: one report from a machine with a GPU: its tests, the selfcheck, the benchmarks.

Each step is a program of its own. A step that fails does not stop the others; the report and the exit status tell of
the failure. With a budget of seconds the list of steps is shorter and begins with the most telling ones. No step runs
beyond the budget.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import ROOT
from benchmarks.commands.arguments import add_out, count, open_bench
from benchmarks.harness.bench import Environment, machine_line
from benchmarks.harness.results import markdown_table, output_path

HELP = "write one report about a GPU: tests, selfcheck, benchmarks"

_STEP_SECONDS = 2 * 3600
_LEAST_SECONDS = 8  # a step is left out if less than this is left of the budget
_KEPT_LINES = 400  # the report keeps so many lines of a step's output, the last ones
_PYTHON = (sys.executable, "-m")


class Step(NamedTuple):
    title: str
    command: list[str]
    folder: Path = ROOT  # where the program starts
    seconds: int = _STEP_SECONDS  # limit of its time
    backend: str | None = None  # SPO_BACKEND of the program


class Outcome(NamedTuple):
    step: Step
    status: int | None  # None: it ran out of time
    seconds: float
    output: str

    @property
    def verdict(self) -> str:
        return "ok" if self.status == 0 else "out of time" if self.status is None else f"FAILED with {self.status}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs the tests marked gpu, the selfcheck and the benchmarks, and writes one page with their outputs. "
        "Exits with 1 if any of them failed."
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="default: cuda")
    add_out(parser)
    parser.add_argument(
        "--budget",
        type=count,
        metavar="SECONDS",
        help="run only the most telling steps, within this many seconds (try 540)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the report, also with --device cpu")
    # open_bench reads these. The steps have arguments of their own.
    parser.set_defaults(threads=None, simd=None, repeats=1)


def _about_the_machine(device: str, out: Path) -> Iterator[Step]:
    # Programs of the installed package start in `out`. In the source tree Python would import the tree instead.
    yield Step("Environment", [*_PYTHON, "spo_kernels.env"], out, 60)
    for tool in ("nvidia-smi", "rocm-smi"):
        if device != "cpu" and shutil.which(tool):
            yield Step("Device", [tool], seconds=30)


def steps(device: str, out: Path, quick: bool) -> Iterator[Step]:
    """The steps of a whole report. quick: all sizes are small, so that a CPU can try the report."""
    yield from _about_the_machine(device, out)
    # A CPU would run no test marked gpu. There, a file with tests for any device stands in.
    chosen = ["-m", "gpu", str(ROOT / "tests")] if device != "cpu" else [str(ROOT / "tests/test_gpu.py")]
    yield Step("Tests", [*_PYTHON, "pytest", *chosen], out)
    rows = ["--rows", "8"] if quick else []
    yield Step("Selfcheck", [*_PYTHON, "spo_kernels.selfcheck", "--device", device, *rows], out)
    common = ["--device", device, "--out", str(out), *(["--repeats", "1"] if quick else [])]
    ops = [*_PYTHON, "benchmarks", "ops", *common]
    if quick:
        yield Step("Ops", [*ops, "--shapes", "16x130", "--providers", "ours", "ours_inplace", "eager"])
    else:
        yield Step("Ops", ops)
        yield Step("Ops at the size of a training step", [*ops, "--shapes", "8192x128256", "--dtypes", "bfloat16"])
    small = ["--pairs", "1", "--tokens", "8", "--vocabulary", "130", "--hidden", "64"]
    narrow = [*small, "--providers", "recompute", "eager"]
    yield Step("Head", [*_PYTHON, "benchmarks", "head", *common, *(narrow if quick else [])])
    yield Step(
        "Training step", [*_PYTHON, "benchmarks", "step", *common, *([*small, "--layers", "1"] if quick else [])]
    )


def budgeted_steps(device: str, out: Path, quick: bool) -> Iterator[Step]:
    """The steps of a report in ten minutes, the most telling first. Tests run in parallel if xdist is installed."""
    yield from _about_the_machine(device, out)
    size = ["--rows", "8", "--vocab", "1000"] if quick else ["--rows", "512"]
    yield Step("Selfcheck", [*_PYTHON, "spo_kernels.selfcheck", "--device", device, *size], out, 90)
    parallel = ["-n", str(min(os.cpu_count() or 1, 10))] if importlib.util.find_spec("xdist") else []
    pytest = [*_PYTHON, "pytest", "-q", "-p", "no:cacheprovider", *parallel]
    gpu_tests, op_tests = str(ROOT / "tests/test_gpu.py"), str(ROOT / "tests/test_ops.py")
    if device == "cpu":
        yield Step("Tests", [*pytest, gpu_tests], out, 150)
    else:
        yield Step("Tests", [*pytest, "-m", "gpu", "-k", "not gpu-triton", gpu_tests, op_tests], out, 150)

    common = ["--device", device, "--out", str(out), "--repeats", "1" if quick else "5"]
    ops = [*_PYTHON, "benchmarks", "ops", *common, "--dtypes", "bfloat16", "--providers"]
    ours, peers = ["ours", "ours_inplace"], ["eager_float", "cross_entropy", "liger", "quack"]
    wide, others = (["16x130"], ["1x130"]) if quick else (["4096x128256"], ["16384x32000", "4096x50257", "8x151936"])
    yield Step("Rows", [*ops, *ours, *peers, "--shapes", *wide], seconds=90)
    head = [*_PYTHON, "benchmarks", "head", *common, "--dtypes", "bfloat16"]
    heads = ["--pairs", "1", "--tokens", "8", "--vocabulary", "130", "--hidden", "64"]
    if not quick:
        heads = ["--pairs", "8", "--tokens", "256", "--vocabulary", "128256", "--hidden", "2048"]
    providers = ["recompute", "recompute_free", "eager", "cross_entropy"]
    yield Step("Head", [*head, *heads, "--providers", *providers], seconds=90)
    model = ["--pairs", "1", "--tokens", "8", "--vocabulary", "130", "--hidden", "64", "--layers", "1"]
    if not quick:
        model = ["--pairs", "16", "--tokens", "256", "--vocabulary", "128256", "--hidden", "2048", "--layers", "16"]
        model += ["--kl-samples", "8"]
    step = [*_PYTHON, "benchmarks", "step", "--device", device, "--out", str(out), "--repeats", "1" if quick else "3"]
    step += [*model, "--dtype", "bfloat16", "--providers", "ours_inplace", "ours_head", "eager"]
    yield Step("Training step of a model with 1B parameters", step, seconds=90)
    yield Step("Rows of other sizes", [*ops, *ours, *peers, "--shapes", *others], seconds=120)
    yield Step("Rows, compiled", [*ops, *ours, "compile", "--shapes", *wide], seconds=120)
    if device == "cpu":
        return
    yield Step("Rows by Triton", [*ops, *ours, "--shapes", *wide, *others], seconds=90, backend="triton")
    yield Step("Tests of Triton", [*pytest, "-m", "gpu", "-k", "gpu-triton", op_tests], out, 180)


def run_step(step: Step, seconds: float = _STEP_SECONDS) -> Outcome:
    """Run a step until `seconds` or its own limit, whichever is less. At the limit its children are killed with it."""
    start = time.perf_counter()
    status: int | None
    variables = os.environ | ({"SPO_BACKEND": step.backend} if step.backend else {})
    try:
        process = subprocess.Popen(
            step.command,
            cwd=step.folder,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a process group of its own, which can be killed as a whole
        )
        try:
            output, _ = process.communicate(timeout=min(seconds, step.seconds))
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            status = None
    except OSError as error:
        status, output = error.errno or 1, str(error)
    return Outcome(step, status, time.perf_counter() - start, output)


def run(options: argparse.Namespace) -> int:
    bench = open_bench(options)
    out = bench.out.resolve()  # the steps start in other folders
    page = output_path(out, "gpu", ".md")
    outcomes: list[Outcome] = []
    end = time.perf_counter() + (options.budget or float("inf"))
    choose = steps if options.budget is None else budgeted_steps
    for step in choose(str(bench.settings.device), out, options.quick):
        left = end - time.perf_counter()
        if left < _LEAST_SECONDS:
            print(f"{step.title}: left out, no time", flush=True)
            continue
        print(f"{step.title}: {shlex.join(step.command)}", flush=True)
        outcomes.append(run_step(step, min(left, _STEP_SECONDS)))
        print(f"  {outcomes[-1].verdict}, {outcomes[-1].seconds:.0f} s", flush=True)
        # Written after each step, so that an interrupted run leaves a report of the steps before.
        page.write_text(_markdown(outcomes, bench.environment))
    print("", page, sep="\n")
    return 0 if all(outcome.status == 0 for outcome in outcomes) else 1


def _markdown(outcomes: list[Outcome], environment: Environment) -> str:
    summary = [[o.step.title, o.verdict, f"{o.seconds:.0f}"] for o in outcomes]
    parts = [
        "# spo_kernels on a GPU",
        machine_line(environment),
        markdown_table(["step", "result", "seconds"], summary, 2),
    ]
    for outcome in outcomes:
        lines = outcome.output.rstrip().splitlines()
        cut = [f"[{len(lines) - _KEPT_LINES} lines left out]"] if len(lines) > _KEPT_LINES else []
        text = "\n".join([*cut, *lines[-_KEPT_LINES:]])
        parts.append(f"## {outcome.step.title}: {outcome.verdict}\n\n`{shlex.join(outcome.step.command)}`")
        parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"
