"""Head and training step of the benchmark suite at tiny sizes: gate, CSV, page. No timing is asserted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_benchmarks import TINY, only, read

from benchmarks import __main__ as cli
from benchmarks.commands import head, step
from benchmarks.peers.head import PROVIDERS as HEAD_PROVIDERS
from benchmarks.peers.head import eager_pairs
from benchmarks.workloads.step import StepRow, StepSize

HEAD_TABLES = [(loss, pass_name) for loss in ("pairs", "kl") for pass_name in ("fwd", "fwd_bwd")]


def test_head_agrees_with_float64_and_writes_its_page(tmp_path: Path) -> None:
    sizes = ["--pairs", "2", "--tokens", "8", "--hidden", "32", "--vocabulary", "200", "--dtypes", "float32"]
    # peers that are installed
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
    # Only our steps run row kernels.
    (row_kernels,) = (line for line in page.splitlines() if line.startswith("| row kernels |"))
    ours, eager, refresh = row_kernels.strip("| ").split(" | ")[1:]
    assert ours != eager == refresh == "0.0 (0%)"


STEP = ["--pairs", "1", "--tokens", "8", "--vocabulary", "200", "--hidden", "32", "--layers", "1"]


def test_a_bfloat16_step_passes_its_gate_and_names_its_dtype(tmp_path: Path) -> None:
    providers = ["ours", "ours_inplace", "ours_head", "eager"]
    arguments = ["step", *TINY, *STEP, "--dtype", "bfloat16", "--providers", *providers, "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    rows = {row["provider"]: row for row in read(only(tmp_path, "step-*.csv"))}
    assert {row["status"] for row in rows.values()} == {"ok"}
    for name in providers:
        assert 1e-5 < float(rows[name]["error_grad"]) < 5e-2  # a float32 step has a smaller error
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
