"""The command line from end to end, on a model that trains in seconds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from spo_train import cli as entry
from spo_train.commands import cli
from spo_train.config import AlignConfig, DemoConfig, EvaluateConfig, PairsConfig, PretrainConfig, RunConfig
from spo_train.models.llama import Llama
from spo_train.tokenizer import Tokenizer
from spo_train.toy.demo import run_demo

COMMANDS = ("pretrain", "reference", "pairs", "align", "evaluate", "report", "demo")
ALIGN = ["--steps", "4", "--batch-size", "4", "--kl-samples", "4", "--kl-every", "2", "--warmup-steps", "1"]
EVALUATE = ["--eval-samples", "4", "--eval-reference-samples", "4", "--evaluate-every", "2"]


def spo_train(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def ok(*arguments: object) -> Result:
    result = spo_train(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object, code: int = 2) -> str:
    """The error message of a command that fails, after a check that no traceback is printed."""
    result = spo_train(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    message = result.output.rsplit("Error: ", 1)[1]
    assert "Traceback" not in result.output
    return message


@pytest.fixture
def model(tmp_path: Path, make_model: Callable[..., Llama], tokenizer: Tokenizer) -> Path:
    make_model().save(tmp_path / "model")
    tokenizer.save(tmp_path / "model" / "tokenizer.model")
    return tmp_path / "model"


def steps(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete(command: str) -> None:
    text = ok(command, "--help").output
    options = [line for line in text.split("Options:")[1].splitlines() if line.startswith("  -")]
    assert options
    described = {p.name: p.help for p in cli.commands[command].params if isinstance(p, click.Option)}
    assert all(described.values()), described


@pytest.mark.parametrize(
    ("command", "config", "prefix"),
    [
        ("pretrain", PretrainConfig, ""),
        ("reference", PretrainConfig, ""),
        ("pairs", PairsConfig, ""),
        ("align", AlignConfig, ""),
        ("align", RunConfig, ""),
        ("align", EvaluateConfig, "evaluate_"),
        ("evaluate", EvaluateConfig, ""),
        ("demo", DemoConfig, ""),
    ],
)
def test_every_setting_has_its_option_with_default_and_bounds(command: str, config: type, prefix: str) -> None:
    options = {option.name: option for option in cli.commands[command].params}
    text = " ".join(ok(command, "--help").output.split())
    for field in fields(config):
        option = options[prefix + field.name]
        flag = option.opts[0]
        section = re.search(rf" {re.escape(flag)} .*?(?= --[a-z]|$)", text)
        assert section, flag
        assert field.default is None or f"[default: {field.default}" in section[0], section[0]
        must_be = field.metadata["must_be"]
        assert f"[{'|'.join(must_be)}]" in section[0] if isinstance(must_be, tuple) else f"; {must_be}]" in section[0]


def test_earlier_names_of_options_work_and_are_hidden(
    tmp_path: Path, model: Path, pairs_file: Path, story_texts: list[str]
) -> None:
    align = ["align", "--pairs", pairs_file, "--model", model, "--out", tmp_path / "run", "--judge", "builtins:len"]
    ok(*align, *ALIGN, "--eval-samples", "4", "--eval-reference-samples=5", "--eval-seed", "7", "--evaluate-every=2")
    evaluate = json.loads((tmp_path / "run" / "run.json").read_text())["evaluate"]
    assert (evaluate["samples"], evaluate["reference_samples"], evaluate["seed"]) == (4, 5, 7)

    (tmp_path / "texts.txt").write_text("\n".join(story_texts))
    shape = ["--vocab-size", "400", "--dim", "16", "--layers", "1", "--heads", "2", "--ffn-dim", "16"]
    pretrain = ["pretrain", tmp_path / "texts.txt", "--per-line", "--out", tmp_path / "base", *shape, "--steps", "3"]
    ok(*pretrain, "--eval-every", "2")
    measured = [json.loads(line) for line in (tmp_path / "base" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in measured if "nll_per_token" in row] == [2, 3]
    assert "already holds a model" in refused(*pretrain)
    ok(*pretrain, "--overwrite", "--lr", "0.01")
    ok(*pretrain, "--restart")
    for command in COMMANDS:
        assert not re.search(r"--eval-|--overwrite", ok(command, "--help").output)


def test_both_trainers_restart(tmp_path: Path, model: Path, pairs_file: Path) -> None:
    align = ["align", "--pairs", pairs_file, "--model", model, "--out", tmp_path / "run", *ALIGN]
    ok(*align)
    first = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "already holds a run" in refused(*align, "--seed", "1")
    assert "seed was 0, is 1" in refused(*align, "--seed", "1", "--resume")
    ok(*align, "--seed", "1", "--restart")
    assert steps(tmp_path / "run" / "metrics.jsonl") == [1, 2, 3, 4]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() != first


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from spo_train.commands import cli\n"
        f"for command in ('', *{COMMANDS}):\n"
        "    assert CliRunner().invoke(cli, [*command.split(), '--help']).exit_code == 0\n"
        "heavy = {'torch', 'matplotlib', 'numpy', 'sentencepiece'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = entry.importlib.util.find_spec
    monkeypatch.setattr(entry.importlib.util, "find_spec", lambda name: None if name == "click" else find_spec(name))
    with pytest.raises(SystemExit) as stopped:
        entry.main()
    assert str(stopped.value) == 'spo-train needs click: pip install "spo_kernels[train]"'


def test_from_text_to_report(tmp_path: Path, story_texts: list[str]) -> None:
    """pretrain, align by both methods, evaluate, report: each command reads what the one before wrote."""
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(story_texts[:60]):
        (tmp_path / "texts" / f"{i:03}.txt").write_text(text)
    shape = ["--vocab-size", "400", "--dim", "16", "--layers", "1", "--heads", "2", "--ffn-dim", "16"]
    ok("pretrain", tmp_path / "texts", "--out", tmp_path / "base", "--steps", "3", "--max-length", "64", *shape)
    pairs = [
        {"prompt": "Once ", "chosen": story_texts[i][:80], "rejected": story_texts[i + 1][:40]} for i in range(0, 20, 2)
    ]
    lines = [json.dumps(pair) for pair in pairs]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines[:5], "{broken", *lines[5:]]))

    for method in ("spo", "dpo"):
        result = ok(
            "align", "--pairs", tmp_path / "pairs.jsonl", "--model", tmp_path / "base", "--out", tmp_path / method,
            "--method", method, "--judge", "builtins:len", *ALIGN, *EVALUATE,
        )  # fmt: skip
        assert "10 pairs, lines left out: 1" in result.output
        assert "line 6: not JSON" in result.output
        assert steps(tmp_path / method / "metrics.jsonl") == [1, 2, 3, 4]
        assert steps(tmp_path / method / "evaluations.jsonl") == [0, 2, 4]
        assert (tmp_path / method / "model" / "model.safetensors").exists()

    result = ok(
        "evaluate", tmp_path / "spo", "--reference", tmp_path / "base", "--judge", "builtins:len", "--samples", "4",
        "--reference-samples", "4", "--texts", tmp_path / "texts.jsonl",
    )  # fmt: skip
    measured = json.loads(result.output)
    assert 0 <= measured["win_rate_low"] <= measured["win_rate"] <= measured["win_rate_high"] <= 1
    assert measured["kl"] > 0
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 4

    result = ok("report", tmp_path / "spo", tmp_path / "dpo", "--out", tmp_path / "report")
    assert "DPO, β = 0.1" in result.output
    assert (tmp_path / "report" / "win_rate.png").stat().st_size > 10_000


def test_reference_command_trains_on_the_grammar(tmp_path: Path) -> None:
    shape = ["--vocab-size", "400", "--dim", "16", "--layers", "1", "--heads", "2", "--ffn-dim", "16"]
    result = ok("reference", "--out", tmp_path / "reference", "--stories", "60", "--steps", "2", *shape)
    assert "held-out NLL" in result.output
    assert json.loads((tmp_path / "reference" / "recipe.json").read_text())["stories"]["count"] == 60
    assert "already holds a model" in refused("reference", "--out", tmp_path / "reference", "--stories", "60", *shape)


def test_pairs_command_writes_what_align_reads(tmp_path: Path, model: Path) -> None:
    # With so much noise some pairs pass the filter even for an untrained model.
    out = tmp_path / "made.jsonl"
    result = ok("pairs", "--model", model, "--out", out, "--pairs", "40", "--noise", "8")
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert f"{len(made)} pairs" in result.output
    ok("align", "--pairs", out, "--model", model, "--out", tmp_path / "run", *ALIGN)
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()


def test_a_killed_run_is_resumed(tmp_path: Path, model: Path, pairs_file: Path) -> None:
    """A real SIGKILL at an arbitrary moment, then --resume: the metrics are those of an unbroken run."""
    arguments = ["align", "--pairs", pairs_file, "--model", model, *ALIGN[2:], "--steps", "30"]
    arguments += ["--checkpoint-every", "3", "--judge", "none"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "spo_train", *map(str, arguments), "--out", str(killed)], env=environment, cwd=tmp_path
    )
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(steps_of_complete_lines(killed / "metrics.jsonl"))
    assert 3 <= done < 30

    assert "already holds a run" in refused(*arguments, "--out", killed)
    ok(*arguments, "--out", killed, "--resume")
    ok(*arguments, "--out", whole)
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (killed, whole)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 30


def steps_of_complete_lines(file: Path) -> list[str]:
    return [line for line in file.read_text().split("\n")[:-1] if line]


def test_bad_input_gets_one_line(tmp_path: Path, model: Path, pairs_file: Path) -> None:
    align = ["align", "--model", model, "--out", tmp_path / "run", *ALIGN]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    missing = tmp_path / "missing"

    assert "missing" in refused(*align, "--pairs", missing)
    assert "no usable pairs" in refused(*align, "--pairs", empty)
    assert "does not exist" in refused("align", "--pairs", pairs_file, "--model", missing, "--out", tmp_path / "run")
    for option, message in {
        "--alpha=-1": "alpha must be at least 0",
        "--alpha=nan": "alpha must be at least 0",
        "--gamma=-0.5": "gamma must be at least 0",
        "--beta=-1": "beta must be at least 0",
        "--lr=0": "lr must be positive",
        "--eval-samples=1": "samples must be at least 2",
        "--method=ppo": "Invalid value for '--method'",
        "--steps=many": "Invalid value for '--steps'",
        "--judge=nowhere:score": 'judge must be "stories"',
        "--device=abacus": "device must be one that torch can use here",
    }.items():
        assert message in refused(*align, "--pairs", pairs_file, option), option
    assert not (tmp_path / "run").exists()
    assert "Missing option '--pairs'" in refused("align", "--out", tmp_path / "run")
    assert "no run" in refused("report", tmp_path, "--out", tmp_path / "report")
    assert "does not exist" in refused("evaluate", missing)
    assert "missing" in refused("pretrain", missing, "--out", tmp_path / "base")


def test_a_tokenizer_that_does_not_fit_is_refused(
    tmp_path: Path, model: Path, pairs_file: Path, story_texts: list[str]
) -> None:
    Tokenizer.train(story_texts, vocab_size=360).save(model / "tokenizer.model")
    message = refused("align", "--pairs", pairs_file, "--model", model, "--out", tmp_path / "run", *ALIGN)
    assert "does not fit" in message


def test_a_damaged_checkpoint_or_model_is_refused(tmp_path: Path, model: Path, pairs_file: Path) -> None:
    align = ["align", "--pairs", pairs_file, "--model", model, "--out", tmp_path / "run", *ALIGN]
    ok(*align)
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert str(checkpoint) in refused(*align, "--resume", code=1)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert str(weights) in refused(*align[:-len(ALIGN)], "--resume")  # fmt: skip


def test_nan_stops_with_a_message(
    tmp_path: Path, make_model: Callable[..., Llama], model: Path, pairs_file: Path
) -> None:
    broken = make_model()
    broken.norm.weight.data[3] = float("nan")
    broken.save(model)
    message = refused(
        "align", "--pairs", pairs_file, "--model", model, "--out", tmp_path / "run", "--method", "dpo", *ALIGN, code=1
    )
    assert "step 1: preference loss is nan" in message


def test_traceback_on_request(tmp_path: Path) -> None:
    result = spo_train("--traceback", "report", tmp_path, "--out", tmp_path / "report")
    assert isinstance(result.exception, FileNotFoundError)


def test_demo(tmp_path: Path) -> None:
    """The demo on the shipped model at sizes that only show that it works: from the start, and with one run missing."""
    tiny = ["--pairs", "60", "--steps", "2", "--batch-size", "2", "--evaluate-every", "1", "--samples", "4"]
    arguments = ["demo", "--out", tmp_path, "--quick", *tiny, "--reference-samples", "4"]
    output = ok(*arguments).output
    for file in ("win_rate.png", "results.md", "results.csv", "stories.md"):
        assert str(tmp_path / "report" / file) in output
        assert (tmp_path / "report" / file).stat().st_size > 0
    for name in ("spo", "dpo-0.1", "dpo-0.3"):
        assert steps(tmp_path / "runs" / name / "evaluations.jsonl") == [0, 1, 2]
    assert "SPO, α = 0.1, β = 0.03" in output.split("best win rate")[1]  # noqa: RUF001 (the paper's letter)

    # A run without run.json and checkpoint is trained again. The others are left alone.
    files = [tmp_path / "pairs.jsonl", *(tmp_path / "runs" / name / "metrics.jsonl" for name in ("spo", "dpo-0.3"))]
    before = [file.stat().st_mtime_ns for file in files]
    (tmp_path / "runs" / "dpo-0.1" / "run.json").unlink()
    (tmp_path / "runs" / "dpo-0.1" / "checkpoint.safetensors").unlink()
    ok(*arguments)
    assert steps(tmp_path / "runs" / "dpo-0.1" / "metrics.jsonl") == [1, 2]
    assert [file.stat().st_mtime_ns for file in files] == before

    assert "steps=2, now 3" in refused(*arguments, "--steps", "3")
    for device in ("abacus", "cuda:99", "meta"):
        assert "device must be one that torch can use here" in refused(*arguments, "--device", device)


def test_a_fresh_demo_removes_the_demos_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DemoConfig(steps=5)
    (tmp_path / "demo.json").write_text(json.dumps({"steps": 7}))
    theirs = ["pairs.jsonl", "reference.jsonl", "runs/spo/run.json", "runs/dpo-0.3/run.json", "report/results.md"]
    mine = ["notes.txt", "runs/other/run.json"]
    for name in theirs + mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    class ReachedError(Exception):
        pass

    def reached(device: str) -> None:
        raise ReachedError

    monkeypatch.setattr("spo_train.toy.demo.load_reference", reached)
    with pytest.raises(ReachedError):
        run_demo(tmp_path, config, fresh=True)
    assert not any((tmp_path / name).exists() for name in theirs)
    assert all((tmp_path / name).exists() for name in mine)
    assert json.loads((tmp_path / "demo.json").read_text())["steps"] == 5


def test_max_length_limits_pairs_and_samples(tmp_path: Path, model: Path, pairs_file: Path) -> None:
    align = ["align", "--pairs", pairs_file, "--model", model, "--out", tmp_path / "run", *ALIGN]
    assert "max_length must be in [2, 48]" in refused(*align, "--max-length", "49")
    said = ok(*align, "--max-length", "12", "--judge", "builtins:len", *EVALUATE).output
    assert "responses truncated: " in said
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert max(record["length"] for record in evaluations) < 12
    assert "max_length was 12, is 13" in refused(*align, "--max-length", "13", "--resume")
    # The aligned model itself has the limit that it had.
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["max_length"] == 48
    assert "which has no chat template, got chat" in refused(*align, "--strings", "chat", "--restart")
