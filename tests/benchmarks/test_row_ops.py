"""Row ops of the benchmark suite at tiny sizes: CSV, gate, byte model, peers. No timing is asserted."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import LEVELS
from tiny_benchmarks import TINY, only, read, run_python
from torch import Tensor

from benchmarks import ROOT
from benchmarks import __main__ as cli
from benchmarks.commands import plot, table
from benchmarks.harness import measure
from benchmarks.peers.row_ops import DEFAULT_PROVIDERS, PROVIDERS
from benchmarks.workloads.row_ops import OPS, WORKLOADS


def replace_provider(monkeypatch: pytest.MonkeyPatch, name: str, op: str, function: object) -> None:
    """Let a provider compute an op by another function."""
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
    # eager_float has rows in half precision only, ours_inplace only for passes with a backward.
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


def test_share_of_the_limit_and_its_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rates = [7e9, 10e9, 20e9, 40e9]  # bytes a second: in the warm-up, which does not count, and in three rounds

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
        # The share of a round is bytes / rate / time: moved / 2e7, moved / 8e7 and moved / 4e7, of which the last is
        # the median. In fwd_bwd two of the three tensors move at the update rate, twice the read rate.
        tensors, at_limits = (1, 1) if row["pass_name"] == "fwd" else (3, 2 / 3)
        moved = 66 * 32000 * 4 * tensors
        assert float(row["model_mb"]) == pytest.approx(moved / 1e6, rel=1e-5)
        assert float(row["gb_per_s"]) == pytest.approx(moved / 1e6 / 2, rel=1e-4)
        assert float(row["limit_share"]) == pytest.approx(moved * at_limits / 4e7, rel=1e-4)
        assert float(row["read_gb_per_s"]) == pytest.approx(15)  # of all four rounds
    plotted = tmp_path / "plot.png"
    assert cli.main(["plot", *out, "--save", str(plotted)]) == 0
    assert plotted.read_bytes().startswith(b"\x89PNG")


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


def test_bars_keep_their_page_when_ours_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    replace_provider(monkeypatch, "ours", "token_logps", WRONG_LOGPS["formula"])
    arguments = ["bars", *TINY, "--runs", "1", "--groups", "ops", "--shapes", "16x150", "--providers", "ours", "eager"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 1
    bar = "| token_logps.fwd: ours, randn x 40 over randn | [16, 150] float32 |"
    page = only(tmp_path, "bars-*.md").read_text()
    assert any(line.startswith(bar) and line.endswith("| not measured |") for line in page.splitlines())
    assert "token_logps.fwd, ours at [16, 150] float32: wrong: logps off by " in capsys.readouterr().out


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


@pytest.mark.skipif(os.environ.get("SPO_BACKEND") == "reference", reason="plain torch allocates temporaries")
@pytest.mark.parametrize("op", OPS)
def test_ours_in_place_allocates_nothing_vocabulary_wide(op: str, tmp_path: Path) -> None:
    arguments = ["ops", *TINY, "--shapes", "64x8000", "--dtypes", "float32", "--ops", f"{op}.fwd_bwd"]
    assert cli.main([*arguments, "--providers", "ours", "ours_inplace", "eager", "--out", str(tmp_path)]) == 0
    extra = {row["provider"]: float(row["extra_mib"]) for row in read(only(tmp_path, "ops-*.csv"))}
    tensor_mib = 64 * 8000 * 4 / (1 << 20)
    assert extra["ours_inplace"] < 0.01 * tensor_mib
    assert extra["ours"] == pytest.approx(tensor_mib, rel=0.01)
    assert extra["eager"] > 2.5 * tensor_mib


def test_every_default_provider_has_a_colour_and_every_provider_a_label() -> None:
    assert set(DEFAULT_PROVIDERS) <= set(plot.COLOURS)
    assert set(PROVIDERS) == set(table.PROVIDER_LABELS)


def test_peers_that_need_a_gpu_say_so() -> None:
    for name in ("liger", "quack"):
        assert PROVIDERS[name].missing(torch.device("cpu")) == "it needs a GPU"
        reason = PROVIDERS[name].missing(torch.device("cuda"))
        assert reason is None or "not installed" in reason


@pytest.mark.skipif(not importlib.util.find_spec("liger_kernel"), reason="liger_kernel is not installed")
def test_liger_gives_the_values_of_the_formula() -> None:
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


def test_floors_are_bytes_over_bandwidth(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["floors", "--shapes", "8192x32000", "--widths", "768"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    h100 = lines[0].index("H100 SXM, us")
    table = {cells[0]: cells[h100] for cells in lines[2:] if len(cells) > h100}
    assert table["token_logps.fwd"] == f"{1e6 * 8192 * 32000 * 2 / 3.35e12:.0f}"
    assert table["token_kl.fwd_bwd"] == f"{1e6 * 8192 * 32000 * 2 * 5 / 3.35e12:.0f}"
    # A logit takes 2 * 768 operations. A kernel that does not store it saves 4 bytes of traffic.
    product = 2 * 768 / 989e12
    assert lines[-1][:3] == ["768", "72%", f"{product / (product + 4 / 3.35e12):.0%}"]
