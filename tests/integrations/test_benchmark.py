"""The command ``trl`` of the benchmark suite, at a tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs TRL, see the extra [trl]")
pytest.importorskip("peft", reason="needs PEFT, see the extra [trl]")

from benchmarks import __main__ as cli


def test_reports_every_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--vocabulary", "500", "--hidden", "16", "--layers", "1", "--new-tokens", "4"]
    assert cli.main(["trl", "--runs", "1", "--kinds", "TRL DPO", "SPO linear", *size, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "trl.md").read_text() == printed
    assert sum(line.startswith(("| TRL DPO |", "| SPO linear |")) for line in printed.splitlines()) == 2
    bars = [line for line in printed.splitlines() if line.endswith(("| pass |", "| MISS |"))]
    assert len(bars) == 7
    assert "nan" not in bars[0]
    assert "nan" in bars[1]  # eager SPO was not measured
