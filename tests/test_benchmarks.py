"""The benchmark suite at tiny sizes: its command line, its gate, its byte model, its files. No timing is asserted."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import LEVELS
from torch import Tensor

from benchmarks import ROOT
from benchmarks import __main__ as cli
from benchmarks.commands import arguments as common
from benchmarks.commands import bars, gpu, growth, head, plot, step, table
from benchmarks.harness import gate, measure
from benchmarks.harness.results import RESULTS_BEGIN, RESULTS_END, replace_results
from benchmarks.harness.rows import column_names
from benchmarks.peers.head import PROVIDERS as HEAD_PROVIDERS
from benchmarks.peers.head import eager_pairs
from benchmarks.peers.row_ops import DEFAULT_PROVIDERS, PROVIDERS
from benchmarks.workloads.head import HeadRow
from benchmarks.workloads.row_case import RowOpRow
from benchmarks.workloads.row_ops import OPS, WORKLOADS
from benchmarks.workloads.step import StepRow, StepSize
from spo_kernels import selfcheck

# One thread: at these sizes a second one only waits.
TINY = ["--repeats", "1", "--threads", "1"]


def run_python(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def replace_provider(monkeypatch: pytest.MonkeyPatch, name: str, op: str, function: object) -> None:
    provider = PROVIDERS[name]
    changed = dataclasses.replace(provider, functions={**provider.functions, op: function})
    monkeypatch.setitem(PROVIDERS, name, changed)


def test_command_line_measures_and_tabulates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shapes", "24x130", "--dtypes", "float32", "bfloat16", "--runs", "2", "--providers"]
    providers = ["ours", "ours_inplace", "eager", "eager_float", "eager_lse", "cross_entropy"]
    done = run_python("-m", "benchmarks", "ops", *TINY, "--out", tmp_path, *arguments, *providers)
    assert done.returncode == 0, done.stderr
    rows = read(only(tmp_path, "ops-*.csv"))
    assert {(row["op"], row["pass_name"]) for row in rows} == set(WORKLOADS)
    assert {row["provider"] for row in rows} == set(providers)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert {row["run"] for row in rows} == {"0", "1"}
    assert {row["status"] for row in rows} == {"ok"}
    # eager_float is for half precision, ours_inplace for passes with a backward: neither has other rows
    assert all(row["dtype"] == "bfloat16" for row in rows if row["provider"] == "eager_float")
    assert all(row["pass_name"] != "fwd" for row in rows if row["provider"] == "ours_inplace")
    for row in rows:
        for column in ("rounds", "wall_ms", "cpu_ms", "gb_per_s", "over_ours", "error_out"):
            assert float(row[column]) >= 0, (column, row)
        assert (row["extra_mib"] == "") == (row["run"] == "1")  # measured once
        assert float(row["wall_p20_ms"]) <= float(row["wall_ms"]) <= float(row["wall_p80_ms"])
        assert row["limit_share"] == ""  # too small for a share to mean anything
        assert all(row[f"env_{column}"] for column in ("commit", "cpu", "date", "backend", "threads"))
        assert row["env_torch"] == torch.__version__
        assert row["env_command"].startswith("python -m benchmarks ops --repeats 1")
        assert str(tmp_path) not in row["env_command"]  # pages are for others to read

    assert cli.main(["table", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("| `token_logps` | 24 x 130 |") == 2 + 4


def test_floors_are_bytes_over_bandwidth(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["floors", "--shapes", "8192x32000", "--widths", "768"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    h100 = lines[0].index("H100 SXM, us")
    table = {cells[0]: cells[h100] for cells in lines[2:] if len(cells) > h100}
    assert table["token_logps.fwd"] == f"{1e6 * 8192 * 32000 * 2 / 3.35e12:.0f}"
    assert table["token_kl.fwd_bwd"] == f"{1e6 * 8192 * 32000 * 2 * 5 / 3.35e12:.0f}"
    # A logit is 1536 operations, and 4 bytes that a kernel which keeps it does not move.
    product = 2 * 768 / 989e12
    assert lines[-1][:3] == ["768", "72%", f"{product / (product + 4 / 3.35e12):.0%}"]


def test_share_of_the_limit_and_its_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rates = [7e9, 10e9, 20e9, 40e9]  # of the warm-up, which does not count, and of three rounds

    def sample(bandwidth: measure.Bandwidth) -> None:
        bandwidth.read.append(rates[len(bandwidth.read)])
        bandwidth.update.append(2 * bandwidth.read[-1])

    def interleave(
        entries: dict[str, measure.Entry], device: torch.device, repeats: int, every_round: Callable[[], None]
    ) -> dict[str, measure.Samples]:
        for _ in rates:
            every_round()
        return {label: measure.Samples([2e-3, 4e-3, 1e-3], [4e-3, 8e-3, 2e-3]) for label in entries}

    monkeypatch.setattr(measure.Bandwidth, "sample", sample)
    monkeypatch.setattr(measure, "interleave", interleave)
    out = ["--out", str(tmp_path)]
    arguments = ["--shapes", "66x32000", "--dtypes", "float32", "--ops", "token_logps", "--providers"]
    assert cli.main(["ops", *TINY, *out, *arguments, "ours", "ours_inplace", "eager"]) == 0
    for row in read(only(tmp_path, "ops-*.csv")):
        # Times at the limits over times taken: moved / 2e7, / 8e7 and / 4e7; of three tensors two at twice the rate.
        tensors, at_limits = (1, 1) if row["pass_name"] == "fwd" else (3, 2 / 3)
        moved = 66 * 32000 * 4 * tensors
        assert float(row["model_mb"]) == pytest.approx(moved / 1e6, rel=1e-5)
        assert float(row["gb_per_s"]) == pytest.approx(moved / 1e6 / 2, rel=1e-4)
        assert float(row["limit_share"]) == pytest.approx(moved * at_limits / 4e7, rel=1e-4)
        assert float(row["read_gb_per_s"]) == pytest.approx(15)  # of all four rounds
    plotted = tmp_path / "plot.png"
    assert cli.main(["plot", *out, "--save", str(plotted)]) == 0
    assert plotted.read_bytes().startswith(b"\x89PNG")


def test_step_agrees_with_float64_and_writes_its_page(tmp_path: Path) -> None:
    sizes = [
        "--pairs",
        "2",
        "--kl-samples",
        "2",
        "--tokens",
        "8",
        "--vocabulary",
        "200",
        "--hidden",
        "32",
        "--layers",
        "1",
    ]
    providers = ["ours", "ours_inplace", "ours_head", "eager", "model_only"]
    assert cli.main(["step", *TINY, *sizes, "--providers", *providers, "--out", str(tmp_path)]) == 0
    rows = {row["provider"]: row for row in read(only(tmp_path, "step-*.csv"))}
    assert list(rows) == [*providers, "refresh"]
    for name in ("ours", "ours_inplace", "ours_head", "eager"):
        assert float(rows[name]["error_loss"]) < 1e-5
        assert 0 < float(rows[name]["error_grad"]) < 1e-4
        share = float(rows["refresh"]["wall_ms"]) / 8
        assert float(rows[name]["with_refresh_ms"]) == pytest.approx(float(rows[name]["wall_ms"]) + share, rel=1e-4)
    page = only(tmp_path, "step-*.md").read_text()
    assert "| ours_inplace |" in page
    # Everyone multiplies matrices; row kernels run in our steps alone.
    (row_kernels,) = (line for line in page.splitlines() if line.startswith("| row kernels |"))
    ours, eager, refresh = row_kernels.strip("| ").split(" | ")[1:]
    assert not ours.endswith("(0%)") and eager == refresh == "0.0 (0%)"


STEP = ["--pairs", "1", "--tokens", "8", "--vocabulary", "200", "--hidden", "32", "--layers", "1"]


def test_a_bfloat16_step_passes_its_gate_and_names_its_dtype(tmp_path: Path) -> None:
    providers = ["ours", "ours_inplace", "ours_head", "eager"]
    arguments = ["step", *TINY, *STEP, "--dtype", "bfloat16", "--providers", *providers, "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    rows = {row["provider"]: row for row in read(only(tmp_path, "step-*.csv"))}
    assert {row["status"] for row in rows.values()} == {"ok"}
    for name in providers:
        assert 1e-5 < float(rows[name]["error_grad"]) < 5e-2  # more than float32 would leave
    page = only(tmp_path, "step-*.md").read_text()
    assert ", 1 layers, bfloat16. " in page and "float32" not in page


def test_a_step_leaves_its_results_before_it_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "profile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["step", *TINY, *STEP, "--providers", "ours_inplace", "eager", "--out", str(tmp_path)])
    assert [row["status"] for row in read(only(tmp_path, "step-*.csv"))] == ["ok"] * 3
    assert "| ours_inplace |" in only(tmp_path, "step-*.md").read_text()


@pytest.mark.parametrize(("device", "expected"), [("cpu", ["eager", "refresh"]), ("cuda", ["eager"])])
def test_a_refresh_is_not_profiled_on_a_gpu(device: str, expected: list[str]) -> None:
    statuses = {"ours_inplace": "wrong: off by 1, relative", "eager": "ok", "refresh": "ok"}
    rows = [StepRow(name, StepSize(1, 1, 1, 8, 200, 32, 1), status) for name, status in statuses.items()]
    assert step.to_profile(rows, torch.device(device)) == expected


@pytest.mark.parametrize(
    ("operator", "part"),
    [
        ("spo_kernels::kl_loss_fwd_", "row kernels"),
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_log_softmax_backward_data", "log-softmax"),
        ("aten::_fused_adamw_", "optimizer and clipping"),
        ("aten::mul", "everything else"),
    ],
)
def test_a_profile_knows_the_parts_of_a_step(operator: str, part: str) -> None:
    assert step.part_of(operator) == part


HEAD_TABLES = [(loss, pass_name) for loss in ("pairs", "kl") for pass_name in ("fwd", "fwd_bwd")]


def test_head_agrees_with_float64_and_writes_its_page(tmp_path: Path) -> None:
    sizes = ["--pairs", "2", "--tokens", "8", "--hidden", "32", "--vocabulary", "200", "--dtypes", "float32"]
    # where they are installed
    peers = [name for name in ("liger", "cut_cross_entropy", "trl") if name in HEAD_PROVIDERS["pairs"]]
    providers = ["--providers", "recompute_free", "recompute", "eager", *peers]
    assert cli.main(["head", *TINY, *sizes, *providers, "--out", str(tmp_path)]) == 0
    rows = read(only(tmp_path, "head-*.csv"))
    measured = {key: [row["provider"] for row in rows if (row["loss"], row["pass_name"]) == key] for key in HEAD_TABLES}
    over_kl = [name for name in providers[1:] if name in HEAD_PROVIDERS["kl"]]
    assert measured == {
        ("pairs", "fwd"): providers[2:],
        ("pairs", "fwd_bwd"): providers[1:],
        ("kl", "fwd"): over_kl[1:],
        ("kl", "fwd_bwd"): over_kl,
    }
    for row in rows:
        assert row["status"] == "ok"
        assert float(row["error_loss"]) < 1e-5
        assert 0 < float(row["error_weight"]) < 1e-4
    assert "| pairs | fwd_bwd | recompute_free |" in only(tmp_path, "head-*.md").read_text()


def test_a_wrong_peer_of_the_head_is_timed_and_takes_part_in_no_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = HEAD_PROVIDERS["pairs"]
    monkeypatch.setitem(pairs, "eager", dataclasses.replace(pairs["eager"], loss=lambda x: eager_pairs(x) * 1.1))
    sizes = ["--pairs", "1", "--tokens", "4", "--hidden", "16", "--vocabulary", "100", "--dtypes", "float32"]
    choice = ["--losses", "pairs", "--passes", "fwd_bwd", "--providers", "recompute", "eager"]
    assert cli.main(["head", *TINY, *sizes, *choice, "--out", str(tmp_path)]) == 0
    ours, peer = read(only(tmp_path, "head-*.csv"))
    assert ours["status"] == "ok" and float(ours["over_products"]) > 0 and ours["over_eager"] == ""
    assert peer["status"] == "wrong: off by 0.1, relative"
    assert float(peer["wall_ms"]) > 0 and peer["over_eager"] == peer["over_products"] == peer["peak_share"] == ""
    assert "), wrong: off by 0.1, relative |  |  | 3 |  |" in only(tmp_path, "head-*.md").read_text()


def test_a_loss_nobody_has_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["head", *TINY, "--providers", "cross_entropy", "--out", str(tmp_path)]) == 2
    assert "none of cross_entropy has the loss 'kl'" in capsys.readouterr().err


def test_heads_of_real_models_are_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "MODELS", {"a": (150, 16), "b": (200, 8)})
    sizes = ["--pairs", "1", "--tokens", "4", "--dtypes", "float32", "--providers", "recompute", "eager"]
    assert cli.main(["head", "--models", *TINY, *sizes, "--out", str(tmp_path)]) == 0
    lines = only(tmp_path, "models-*.md").read_text().splitlines()
    for cells in ("a | 150 x 16 | float32 | pairs | fwd |", "b | 200 x 8 | float32 | kl | fwd_bwd |"):
        assert sum(cells in line for line in lines) == 1
    assert sum(line.startswith(("| a |", "| b |")) for line in lines) == 8


def test_bars_are_all_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bars", *TINY, "--runs", "1", "--shapes", "16x150", "--providers", "ours", "ours_inplace", "eager"]
    assert cli.main([*arguments, "--head-shape", "16x8x130", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith(("| token_", "| kl_loss", "| head"))]
    # Of the ops both dtypes, two of kl_loss in float32 alone; of the head two routes in two dtypes; two of calls.
    assert len(lines) == 2 * 12 + 2 + 4 * 3 + 2
    # Over compile, of the AVX2 level, the share of a bandwidth that so small a case does not show.
    assert sum(line.endswith("| not measured |") for line in lines) == 2 * 5 + 1
    assert all("pass (" in line or "MISS (" in line for line in lines if "not measured" not in line)
    assert "A torch.autograd.Function that does nothing takes" in printed
    assert "The head's products alone take" in printed
    for name in ("bars-*.csv", "bars_head-*.csv"):
        assert read(only(tmp_path, name))


@pytest.mark.parametrize("shape", ["4096x768", "17x8x130", "0x8x130", "16xax130"])
def test_a_bad_head_shape_is_named(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bars", "--head-shape", shape])
    assert shape in capsys.readouterr().err


@pytest.mark.skipif(not LEVELS, reason="SIMD levels belong to the compiled cpu backend")
def test_levels_measures_each_level_that_there_is(tmp_path: Path) -> None:
    arguments = ["levels", *TINY, "--shapes", "16x150", "--dtypes", "float16", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    rows = read(only(tmp_path, "levels-*.csv"))
    names = {row["provider"] for row in rows if row["status"] == "ok"}
    assert ("ours_avx2" in names) == ("ours_avx2_inplace" in names) == ("avx2" in LEVELS)
    assert {"ours", "ours_portable", "ours_portable_inplace", "eager"} <= names
    table = [line for line in only(tmp_path, "levels-*.md").read_text().splitlines() if "float16" in line[2:]]
    assert sum(line.startswith("| `token_kl.fwd` |") for line in table) == 1
    assert all(line.count("x |") >= 2 for line in table if line.startswith("| `"))


def test_bar_verdict() -> None:
    speed = bars.Bar("speed", "anything", needed=8.0, at_least=True)
    assert speed.verdict([7.0, 9.0, 8.0]).startswith("pass")
    assert speed.verdict([7.0, 9.0, 7.9]) == "MISS (-1%)"
    assert speed.verdict([]) == "not measured"
    slowdown = dataclasses.replace(speed, needed=1.3, at_least=False)
    assert slowdown.verdict([1.3]).startswith("pass")
    assert slowdown.verdict([1.31]).startswith("MISS")
    assert speed.verdict([float("nan")]).startswith("MISS")


WRONG_LOGPS = {
    "formula": lambda logits, labels, **_: torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0] * 1.01,
    "last_row": lambda logits, labels, **_: torch.cat(
        [PROVIDERS["eager"].functions["token_logps"](logits, labels)[:-1], logits[-1:, 0]]
    ),
    "nan": lambda logits, labels, **_: logits[:, 0] * float("nan"),
}


@pytest.mark.parametrize("wrong", WRONG_LOGPS.values(), ids=WRONG_LOGPS)
def test_gate_fails_the_run_when_ours_is_wrong(wrong, tmp_path: Path, monkeypatch, capsys) -> None:
    replace_provider(monkeypatch, "ours", "token_logps", wrong)
    arguments = ["ops", *TINY, "--shapes", "24x130", "--dtypes", "float32", "--ops", "token_logps.fwd"]
    assert cli.main([*arguments, "--providers", "ours", "eager", "--out", str(tmp_path)]) == 1
    ours, eager = read(only(tmp_path, "ops-*.csv"))
    assert ours["status"].startswith("wrong: logps off by ")
    assert ours["wall_ms"] == ""
    assert eager["status"] == "ok"
    assert "ours wrong" in capsys.readouterr().err


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        return -torch.softmax(logits, -1) * grad[:, None], None  # the label's own 1 is missing


def test_a_wrong_peer_is_in_no_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_provider(monkeypatch, "eager", "token_logps", _WrongGradient.apply)
    arguments = ["ops", *TINY, "--shapes", "24x130", "--dtypes", "float32", "bfloat16", "--ops", "token_logps"]
    assert cli.main([*arguments, "--providers", "ours", "eager", "--out", str(tmp_path)]) == 0
    rows = {(row["dtype"], row["pass_name"], row["provider"]): row for row in read(only(tmp_path, "ops-*.csv"))}
    for dtype in ("float32", "bfloat16"):
        assert rows[dtype, "fwd", "eager"]["status"] == "ok"
        wrong = rows[dtype, "fwd_bwd", "eager"]
        assert wrong["status"].startswith("wrong: gradient of logits off by ")
        assert float(wrong["wall_ms"]) > 0 and wrong["over_ours"] == ""  # timed, and in no ratio
        assert rows[dtype, "fwd_bwd", "ours"]["status"] == "ok"


def test_a_failing_peer_is_noted_and_ours_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Tensor) -> Tensor:
        raise RuntimeError("no compiler\nsecond line")

    arguments = ["ops", *TINY, "--shapes", "24x130", "--dtypes", "float32", "--ops", "token_logps.fwd"]
    arguments += ["--providers", "ours", "eager"]
    replace_provider(monkeypatch, "eager", "token_logps", fails)
    assert cli.main([*arguments, "--out", str(tmp_path / "peer")]) == 0
    assert read(only(tmp_path / "peer", "ops-*.csv"))[1]["status"] == "failed: no compiler"
    replace_provider(monkeypatch, "ours", "token_logps", fails)
    assert cli.main([*arguments, "--out", str(tmp_path / "ours")]) == 1


@pytest.mark.parametrize(
    ("op", "pass_name", "read_tensors", "update_tensors"),
    [
        ("token_logps", "fwd", 1, 0),
        ("token_logps", "fwd_bwd", 1, 2),
        ("token_kl", "fwd", 2, 0),
        ("token_kl", "fwd_bwd", 3, 2),
        ("token_logps_kl", "fwd_bwd", 3, 2),
        ("kl_loss", "fwd_bwd", 1, 2),
        ("kl_loss", "fwd_bwd_scaled", 1, 4),
    ],
)
def test_byte_model(op: str, pass_name: str, read_tensors: int, update_tensors: int) -> None:
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        moved = OPS[op].bytes_moved(pass_name, (10, 7), dtype)
        assert moved == (read_tensors * 70 * size, update_tensors * 70 * size)


def test_peak_memory_counts_what_a_call_allocates() -> None:
    mib = torch.empty(1 << 18)

    def two_at_once() -> Tensor:
        first = mib + 1
        second = first * 2  # both alive: 2 MiB
        del first
        return second + 1  # still 2

    peak = measure.peak_memory(measure.Entry(two_at_once), torch.device("cpu"))
    assert peak.allocator == pytest.approx(2 << 20, rel=0.01)
    peak = measure.peak_memory(measure.Entry(lambda: mib.add_(1)), torch.device("cpu"))
    assert peak.allocator < 1 << 12


@pytest.mark.skipif(os.environ.get("SPO_BACKEND") == "reference", reason="the oracle is not frugal")
@pytest.mark.parametrize("op", OPS)
def test_ours_in_place_allocates_nothing_vocabulary_wide(op: str, tmp_path: Path) -> None:
    arguments = ["ops", *TINY, "--shapes", "64x8000", "--dtypes", "float32", "--ops", f"{op}.fwd_bwd"]
    assert cli.main([*arguments, "--providers", "ours", "ours_inplace", "eager", "--out", str(tmp_path)]) == 0
    extra = {row["provider"]: float(row["extra_mib"]) for row in read(only(tmp_path, "ops-*.csv"))}
    tensor_mib = 64 * 8000 * 4 / (1 << 20)
    assert extra["ours_inplace"] < 0.01 * tensor_mib
    assert extra["ours"] == pytest.approx(tensor_mib, rel=0.01)
    assert extra["eager"] > 2.5 * tensor_mib


def test_interleave_takes_turns_and_leaves_preparation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_BURST", 1)
    calls: list[str] = []
    entries = {
        name: measure.Entry(
            lambda name=name: calls.append(name),
            lambda name=name: calls.append(f"prepare {name}"),
            lambda name=name: calls.append(f"finish {name}"),
        )
        for name in ("a", "b")
    }
    samples = measure.interleave(entries, torch.device("cpu"), 2, lambda: calls.append("round"))
    turn = [[f"prepare {name}", name, f"finish {name}"] for name in ("a", "b")]
    forwards, backwards = [*turn[0], *turn[1], "round"], [*turn[1], *turn[0], "round"]
    assert calls[:21] == [*forwards, *forwards, *backwards]  # warm-up, then the order rotates
    assert len(samples["a"].wall) == len(samples["b"].cpu) >= 2


def test_statistics() -> None:
    assert measure.quantile([4.0, 1.0, 3.0, 2.0, 5.0], 0.2) == pytest.approx(1.8)
    assert measure.quantile([7.0], 0.8) == 7.0
    assert measure.paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0


def test_nothing_is_worse_than_nan() -> None:
    for errors in ([float("nan"), 1.0], [1.0, float("nan")]):
        assert gate.by_norm(dict(enumerate(errors)), budget=2.0).problem == "wrong: off by nan, relative"


def test_results_are_put_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{RESULTS_BEGIN}\nold\n{RESULTS_END}\nafter\n")
    replace_results(page, "| new |")
    assert page.read_text() == f"before\n{RESULTS_BEGIN}\n\n| new |\n\n{RESULTS_END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="must hold"):
        replace_results(page, "| new |")


@pytest.mark.parametrize("kind", table.KINDS)
def test_every_kind_of_result_has_its_page(kind: str) -> None:
    shipped = (table.RESULTS / f"{kind}.md").read_text()
    assert shipped.count(RESULTS_BEGIN) == shipped.count(RESULTS_END) == 1


def test_table_updates_the_page_of_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "RESULTS", tmp_path / "pages")
    table.RESULTS.mkdir()
    for kind in ("ops", "bars", "step"):
        (table.RESULTS / f"{kind}.md").write_text(f"{kind}\n{RESULTS_BEGIN}\nold\n{RESULTS_END}\n")
    arguments = ["ops", *TINY, "--shapes", "8x130", "--dtypes", "float32", "--ops", "token_kl.fwd"]
    assert cli.main([*arguments, "--providers", "ours", "eager", "--out", str(tmp_path)]) == 0
    (tmp_path / "bars-1.md").write_text("**Bars.** new\n")
    assert cli.main(["table", "--out", str(tmp_path), "--update"]) == 0
    pages = {page.stem: page.read_text() for page in table.RESULTS.iterdir()}
    assert "| `token_kl` | 8 x 130 |" in pages["ops"] and "Bars" not in pages["ops"]
    assert pages["bars"] == f"bars\n{RESULTS_BEGIN}\n\n**Bars.** new\n\n{RESULTS_END}\n"
    assert "old" in pages["step"]  # nothing was measured for it


def test_table_names_a_page_of_no_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ops", *TINY, "--shapes", "8x130", "--dtypes", "float32", "--ops", "token_kl.fwd"]
    assert cli.main([*arguments, "--providers", "ours", "eager", "--out", str(tmp_path)]) == 0
    (tmp_path / "notes.md").touch()
    assert cli.main(["table", str(only(tmp_path, "ops-*.csv")), str(tmp_path / "notes.md")]) == 2
    assert "notes.md must begin with the command that wrote it: step, " in capsys.readouterr().err


TIMES = ["rounds", "wall_ms", "wall_p20_ms", "wall_p80_ms", "cpu_ms"]
MEMORY = ["extra_mib", "extra_resident_mib"]
COLUMNS = {
    RowOpRow: [
        *["run", "op", "pass_name", "shape", "dtype", "scale", "cache", "provider", "status"],
        *[*TIMES, "cpu_p20_ms", "cpu_p80_ms", "model_mb", "gb_per_s", "limit_share"],
        *["read_gb_per_s", "update_gb_per_s", "limit_source", *MEMORY, "error_out", "error_grad"],
        *["over_ours", "over_ours_cpu", "over_ours_inplace", "over_ours_inplace_cpu"],
    ],
    HeadRow: [
        *["loss", "pass_name", "provider", "dtype", "rows", "hidden", "vocabulary", "pairs", "status"],
        *[*TIMES, "units", "peak_share", "peak_gflop_per_s", "native_gflop_per_s", *MEMORY],
        *["error_loss", "error_hidden", "error_weight", "over_eager", "over_products"],
    ],
    StepRow: [
        *["provider", "pairs", "kl_samples", "kl_every", "tokens", "vocabulary", "hidden", "layers", "status"],
        *[*TIMES, "with_refresh_ms", *MEMORY, "error_loss", "error_grad", "over_ours", "over_ours_inplace"],
    ],
}


@pytest.mark.parametrize("row_type", COLUMNS)
def test_columns_are_an_interface(row_type: type) -> None:
    assert column_names(row_type) == COLUMNS[row_type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--shapes", "4096"], "must be NxV"),
        (["ops", "--ops", "token_logits"], "must be an op or op.pass of token_logps.fwd"),
        (["ops", "--repeats", "0"], "must be a whole number >= 1"),
        (["ops", "--providers", "nobody"], "invalid choice: 'nobody'"),
        (["table", "--out", "nowhere"], "no timed op in nowhere"),
        (["plot", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_the_unbuilt_tree_does_not_shadow_the_installed_package(tmp_path: Path) -> None:
    for package in ("benchmarks", "spo_kernels"):
        (tmp_path / package).mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_bytes((ROOT / "benchmarks" / "__init__.py").read_bytes())
    (tmp_path / "benchmarks" / "__main__.py").write_text(
        "import importlib.util; print(importlib.util.find_spec('spo_kernels').origin)"
    )
    ours = tmp_path / "spo_kernels" / "__init__.py"
    ours.touch()
    installed = importlib.util.find_spec("spo_kernels")
    assert installed is not None
    assert run_python("-m", "benchmarks", cwd=tmp_path).stdout.strip() == installed.origin
    (tmp_path / "spo_kernels" / "libspo_kernels.so").touch()  # a built tree is what should be measured
    assert run_python("-m", "benchmarks", cwd=tmp_path).stdout.strip() == str(ours)


class FakeEvent:
    """Stands in for torch.cuda.Event: a tick of a counter that every call of the test advances."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1.0

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        assert self.at >= 0

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_a_gpu_is_timed_between_events_with_cold_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []

    class Flush:
        def sum(self) -> None:
            flushed.append(FakeEvent.now)
            FakeEvent.now += 1000

    def call() -> None:
        FakeEvent.now += 3

    monkeypatch.setattr(FakeEvent, "now", 0.0)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: Flush())
    clock = measure._Clock(torch.device("cuda"))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    assert [clock.time(call)[0] for _ in range(2)] == [3e-3, 3e-3]
    assert len(flushed) == 2
    assert selfcheck._seconds(call, torch.device("cuda"), repeats=3) == 3e-3


def test_every_provider_that_is_measured_by_default_is_drawn() -> None:
    assert set(DEFAULT_PROVIDERS) <= set(plot.COLOURS)
    assert set(PROVIDERS) == set(table.PROVIDER_LABELS)


def test_peers_that_need_a_gpu_say_so() -> None:
    for name in ("liger", "quack"):
        assert PROVIDERS[name].missing(torch.device("cpu")) == "it needs a GPU"
        reason = PROVIDERS[name].missing(torch.device("cuda"))
        assert reason is None or "not installed" in reason


@pytest.mark.skipif(not importlib.util.find_spec("liger_kernel"), reason="liger_kernel is not installed")
def test_liger_is_called_as_it_wants_to_be() -> None:
    program = """
import torch
from benchmarks.peers.eager import token_logps
from benchmarks.peers.row_ops import PROVIDERS
logits, labels, upstream = torch.randn(4, 50, requires_grad=True), torch.randint(50, (4,)), torch.rand(4)
expected = token_logps(logits, labels)
(truth,) = torch.autograd.grad(expected, logits, upstream)
got = PROVIDERS["liger"].functions["token_logps"](logits * 1, labels)
torch.testing.assert_close(got, expected)
torch.testing.assert_close(torch.autograd.grad(got, logits, upstream)[0], truth)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


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
                    cli.parser().parse_args(arguments)


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_is_named_by_its_index(name: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.set_device` refuses a device without one."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    settings, _ = common.settings_and_simd(cli.parser().parse_args(["ops", "--device", name]))
    assert settings.device == torch.device("cuda", index)
    monkeypatch.setattr(selfcheck, "copy_bandwidth", lambda device, repeats: 1e9)
    monkeypatch.setattr(selfcheck, "check", lambda *args: iter(()))
    selfcheck.main(["--device", name])
    assert chosen == [index, index]


def test_on_a_gpu_the_limit_is_that_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        def __init__(self, device: torch.device) -> None:
            pass

        def time(self, call: Callable[[], object]) -> tuple[float, float]:
            call()
            return 0.5, 0.5

    ones = torch.ones
    monkeypatch.setattr(measure, "_Clock", Clock)
    monkeypatch.setattr(torch, "ones", lambda *size, dtype, device: ones(*size, dtype=dtype))
    limit = measure.Bandwidth(4000, torch.device("cuda"), 1)
    limit.sample()
    assert limit.source == "torch.Tensor.copy_"
    assert limit.read == limit.update == [2 * 4000 / 0.5]


def test_growth_measures_every_axis_and_draws_it(tmp_path: Path) -> None:
    sizes = ["--rows", "4", "8", "--vocabulary", "50", "100", "--hidden", "8", "--threads", "2"]
    assert cli.main(["growth", *TINY, *sizes, "--out", str(tmp_path)]) == 0
    rows = read(only(tmp_path, "growth-*.csv"))
    points = {
        (row["axis"], row["what"], row["provider"], row["rows"], row["vocabulary"], row["threads"]) for row in rows
    }
    lines = [("token_kl", name) for name in ("ours", "ours_inplace", "eager")]
    lines += [
        (what, name) for what in ("head pair loss", "head KL") for name in ("recompute_free", "recompute", "eager")
    ]
    sizes = [("rows", "4", "50", "2"), ("rows", "8", "50", "2"), ("vocabulary", "4", "50", "2")]
    sizes += [("vocabulary", "4", "100", "2"), ("threads", "4", "50", "1"), ("threads", "4", "50", "2")]
    assert points == {(axis, *line, *rest) for line in lines for axis, *rest in sizes}
    assert all(row["status"] == "ok" and float(row["wall_ms"]) > 0 for row in rows)
    page = only(tmp_path, "growth-*.md").read_text()
    assert "| head KL: recompute_free |" in page and "rows 4 to 8, vocabulary 50 to 100, threads 1 to 2" in page
    assert only(tmp_path, "growth-*.png").read_bytes().startswith(b"\x89PNG")


def test_growth_takes_whole_pairs_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["growth", *TINY, "--rows", "4", "7", "--out", str(tmp_path)]) == 2
    assert "--rows must be multiples of 4, pairs of 2 tokens each, got 7" in capsys.readouterr().err


@pytest.mark.parametrize("power", [0.0, 1.0, -1.0])
def test_exponent_is_the_slope_in_logarithms(power: float) -> None:
    assert growth.exponent([(n, 3.0 * n**power) for n in (2, 4, 16)]) == pytest.approx(power)
    assert growth.exponent([(2, 3.0)]) is None
    assert growth.exponent([(2, 3.0), (4, 0.0)]) is None


@pytest.mark.slow
def test_all_measures_everything_and_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, figure = tmp_path / "page.md", tmp_path / "growth.png"
    page.write_text(f"before\n{RESULTS_BEGIN}\nlast year's\n{RESULTS_END}\nafter\n")
    arguments = ["all", "--quick", "--out", str(tmp_path / "out"), "--page", str(page)]
    assert cli.main(arguments) == 2  # the figure of the repository is not for tiny sizes
    assert "--quick needs --page and --figure" in capsys.readouterr().err
    assert cli.main([*arguments, "--figure", str(figure)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "last year's" not in text
    for part in ("| `token_kl` | 16 x 150 |", "**The head.", "| token_kl: ours |", "| ours |", "| token_logps.fwd:"):
        assert part in text, part
    assert figure.read_bytes().startswith(b"\x89PNG")
