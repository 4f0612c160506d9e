"""`spo-train align` in several processes equals one process, and only the first of them writes files."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentencepiece", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="runs with the other tests of several processes, see the extra [trl]")

from processes import Processes
from safetensors.torch import load_file
from torch.distributed import ProcessGroup

from spo_train.commands import cli
from spo_train.models import llama
from spo_train.toy.grammar import stories

# 5 pairs and 5 samples do not divide by the number of processes.
SMALL = ["--batch-size", "5", "--kl-samples", "5", "--kl-every", "2", "--lr", "1e-3", "--warmup-steps", "0"]
SMALL += ["--max-length", "40", "--checkpoint-every", "2"]
SPO = [*SMALL, "--beta", "0.1"]
DPO = [*SMALL, "--method", "dpo"]
TIMES = {"seconds", "seconds_preference", "seconds_sampling", "seconds_kl", "tokens_per_second"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng, texts = random.Random(0), list(stories(60, seed=5))
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
            cut = (" ".join(text.split()[: rng.randint(3, 30)]) for text in (chosen, rejected))
            lines.write(json.dumps({"prompt": "", **dict(zip(("chosen", "rejected"), cut, strict=True))}) + "\n")
    return str(file)


def align(arguments: Sequence[str]) -> int:
    """The exit status of the command."""
    try:
        cli.main(["align", *arguments], prog_name="spo-train")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def as_launched(group: ProcessGroup) -> None:
    """The environment that torchrun gives."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # of an earlier test
    os.environ.update({"RANK": str(group.rank()), "WORLD_SIZE": str(group.size()), "LOCAL_RANK": str(group.rank())})


def align_with(group: ProcessGroup, arguments: Sequence[str], draws_all: bool = False) -> int:
    as_launched(group)
    if draws_all:  # a user's model that knows nothing of processes
        whole = llama.Llama.sample

        def sample(self: Any, prompts: Any, *, max_length: int, temperature: float = 1.0, generator: Any = None) -> Any:
            return whole(self, prompts, max_length=max_length, temperature=temperature, generator=generator)

        llama.Llama.sample = sample  # type: ignore[method-assign]
        try:
            return align(arguments)
        finally:
            llama.Llama.sample = whole  # type: ignore[method-assign]
    return align(arguments)


def metrics(out: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in record.items() if name not in TIMES and value is not None} for record in records
    ]


def check_equal(out: Path, one: Path) -> None:
    for ours, theirs in zip(metrics(out), metrics(one), strict=True):
        # Differences of log-probs have the rounding of log-probs.
        assert ours.pop("margin") == pytest.approx(theirs.pop("margin"), abs=1e-5 * abs(theirs["logp_chosen"]))
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    weights, truth = (load_file(folder / "model" / "model.safetensors") for folder in (out, one))
    # AdamW turns the rounding of a gradient near 0 into a whole step, so single weights may differ more.
    assert all((weights[name] - truth[name]).norm() < 1e-5 * truth[name].norm() for name in truth)


@pytest.mark.parametrize(
    ("options", "draws_all"),
    [
        ([*SPO, "--normalizer", "batch"], False),
        ([*SPO, "--normalizer", "ema"], True),
        (DPO, False),
    ],
    ids=["batch", "ema", "dpo"],
)
def test_align(processes: Processes, pairs: str, options: list[str], draws_all: bool, tmp_path: Path) -> None:
    arguments = ["--pairs", pairs, "--steps", "4", "--judge", "none", *options, "--out"]
    assert align([*arguments, str(tmp_path / "one")]) == 0
    size = len(processes)
    assert processes.run(size, align_with, [*arguments, str(tmp_path / "several")], draws_all) == [0] * size
    check_equal(tmp_path / "several", tmp_path / "one")
    assert json.loads((tmp_path / "several" / "run.json").read_text())["processes"] == size


@pytest.mark.parametrize("options", [[*SPO, "--normalizer", "ema"], DPO], ids=["spo", "dpo"])
@pytest.mark.parametrize("resumes_alone", [False, True])
def test_resume(two_processes: Processes, pairs: str, options: list[str], resumes_alone: bool, tmp_path: Path) -> None:
    """With the same number of processes, bit by bit; one process goes on from their checkpoint too."""
    arguments = ["--pairs", pairs, "--judge", "none", *options]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    two_processes.run(2, align_with, [*arguments, "--steps", "5", "--out", str(unbroken)])
    two_processes.run(2, align_with, [*arguments, "--steps", "3", "--out", str(broken)])
    rest = [*arguments, "--steps", "5", "--resume", "--out", str(broken)]
    if resumes_alone:
        assert align(rest) == 0
        check_equal(broken, unbroken)
        return
    assert two_processes.run(2, align_with, rest) == [0, 0]
    assert metrics(broken) == metrics(unbroken)


def test_evaluations_are_those_of_one_process(two_processes: Processes, pairs: str, tmp_path: Path) -> None:
    few = ["--evaluate-samples", "4", "--evaluate-reference-samples", "4", "--evaluate-every", "2"]
    arguments = ["--pairs", pairs, "--steps", "2", "--judge", "stories", *few, *SPO, "--out"]
    align([*arguments, str(tmp_path / "one")])
    assert two_processes.run(2, align_with, [*arguments, str(tmp_path / "two")]) == [0, 0]
    one, two = ((tmp_path / name / "evaluations.jsonl").read_text().splitlines() for name in ("one", "two"))
    assert [json.loads(line) for line in two] == [pytest.approx(json.loads(line), rel=1e-4, abs=1e-6) for line in one]
    assert {file.name for file in (tmp_path / "two").iterdir()} == {file.name for file in (tmp_path / "one").iterdir()}


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    command = (sys.executable, "-m", *command)
    # Outside the root: Python would import the source tree from the current directory, before the installed package.
    folder, pipe = Path(__file__).parent, subprocess.PIPE
    return subprocess.Popen(command, env=given, text=True, stdout=pipe, stderr=subprocess.STDOUT, cwd=folder)


def torchrun(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "spo_train", "align")
    return start(*launch, *arguments, **environment)


def test_torchrun_stops_and_resumes(pairs: str, tmp_path: Path) -> None:
    arguments = ["--pairs", pairs, "--judge", "none", *SPO, "--out", str(tmp_path)]
    run = torchrun(*arguments, "--steps", "10000")
    wait_for(lambda: (tmp_path / "checkpoint.safetensors").exists(), run)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    done = len(metrics(tmp_path))
    again = torchrun(*arguments, "--resume", "--steps", str(done + 1))
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output
    assert [record["step"] for record in metrics(tmp_path)] == list(range(1, done + 2))
    assert output.count("aligned model in") == 1


def wait_for(condition: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("launcher", ["torchrun", "none"])
def test_a_rank_that_dies_ends_the_other(launcher: str, pairs: str, tmp_path: Path) -> None:
    """The first process dies in its evaluation, while the other one waits for it."""
    (tmp_path / "deadly.py").write_text("import os\ndef judge(text):\n    os.kill(os.getpid(), 9)\n")
    few = ["--evaluate-samples", "2", "--evaluate-reference-samples", "2", "--judge", "deadly:judge"]
    arguments = ["--pairs", pairs, *SPO, *few, "--out", str(tmp_path / "out")]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    if launcher == "torchrun":
        runs = [torchrun(*arguments, PYTHONPATH=path)]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": path}
        runs = [start("spo_train", "align", *arguments, RANK=str(rank), **world) for rank in range(2)]
        runs[0].communicate(timeout=120)
        assert runs[0].returncode == -signal.SIGKILL
    died = time.monotonic()
    output = runs[-1].communicate(timeout=120)[0]
    assert runs[-1].returncode != 0
    if launcher == "torchrun":
        assert "SIGKILL" in output or "-9" in output, output
    assert time.monotonic() - died < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SPO, "--kl-samples", "1"], "kl_samples must be at least the number of processes, 2, got 1"),
        ([*SPO, "--batch-size", "1"], "batch_size must be at least the number of processes, 2, got 1"),
        ([*SPO, "--device", "cuda:1"], 'device must be "cpu" or "cuda" under torchrun'),
    ],
    ids=["samples", "batch", "device"],
)
def test_refusals(two_processes: Processes, pairs: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    given = ["--pairs", pairs, "--judge", "none", "--out", str(tmp_path / "out"), *arguments]
    results = two_processes.run(2, refused, given)
    assert all(status == 2 and message in error for status, error in results), results
    assert not (tmp_path / "out").exists()


def refused(group: ProcessGroup, arguments: Sequence[str], asks_for_fsdp: bool = False) -> tuple[int, str]:
    """Exit status and error of the command."""
    from click.testing import CliRunner

    as_launched(group)
    if asks_for_fsdp:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    result = CliRunner().invoke(cli, ["align", *arguments] if arguments[0].startswith("-") else list(arguments))
    return result.exit_code, result.output


def test_other_commands_are_refused(two_processes: Processes, tmp_path: Path) -> None:
    results = two_processes.run(2, refused, ["demo", "--out", str(tmp_path / "demo")])
    assert all(status == 2 and "runs in one process, got WORLD_SIZE=2" in error for status, error in results), results


def test_sharded_models_are_refused(two_processes: Processes, pairs: str, tmp_path: Path) -> None:
    results = two_processes.run(2, refused, ["--pairs", pairs, "--out", str(tmp_path / "out")], True)
    assert all(status == 2 and "spo-train does not shard models" in error for status, error in results), results
