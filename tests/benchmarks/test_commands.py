"""The commands bars, growth, table and all of the benchmark suite, and bad arguments of every command."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from tiny_benchmarks import TINY, only, read, run_python

from benchmarks import ROOT
from benchmarks import __main__ as cli
from benchmarks.commands import arguments as common
from benchmarks.commands import bars, growth, table
from benchmarks.harness.results import RESULTS_BEGIN, RESULTS_END
from spo_kernels import selfcheck


def test_bars_are_all_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bars", *TINY, "--runs", "1", "--shapes", "16x150", "--providers", "ours", "ours_inplace", "eager"]
    assert cli.main([*arguments, "--head-shape", "16x8x130", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith(("| token_", "| kl_loss", "| head"))]
    # Row ops: 12 bars in each of two dtypes, and 2 of kl_loss in float32 only. Head: 3 bars in each dtype for each of
    # two routes. Calls: 2 bars.
    assert len(lines) == 2 * 12 + 2 + 4 * 3 + 2
    # Not measured in each dtype: three ratios to compiled code, the AVX2 level, and the share of the bandwidth, for
    # which the case is too small. In float32 also the ratio of kl_loss to compiled code.
    assert sum(line.endswith("| not measured |") for line in lines) == 2 * 5 + 1
    assert all("pass (" in line or "MISS (" in line for line in lines if "not measured" not in line)
    assert "A torch.autograd.Function that does nothing takes" in printed
    assert "The head's products alone take" in printed
    for name in ("bars-*.csv", "bars_head-*.csv"):
        assert read(only(tmp_path, name))


def test_bar_verdict() -> None:
    speed = bars.Bar("speed", "anything", needed=8.0, at_least=True)
    assert speed.verdict([7.0, 9.0, 8.0]).startswith("pass")
    assert speed.verdict([7.0, 9.0, 7.9]) == "MISS (-1%)"
    assert speed.verdict([]) == "not measured"
    slowdown = dataclasses.replace(speed, needed=1.3, at_least=False)
    assert slowdown.verdict([1.3]).startswith("pass")
    assert slowdown.verdict([1.31]).startswith("MISS")
    assert speed.verdict([float("nan")]).startswith("MISS")


@pytest.mark.parametrize("shape", ["4096x768", "17x8x130", "0x8x130", "16xax130"])
def test_a_bad_head_shape_is_named(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bars", "--head-shape", shape])
    assert shape in capsys.readouterr().err


@pytest.mark.slow
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


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_is_named_by_its_index(name: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.set_device` refuses a device without an index."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    settings, _ = common.settings_and_simd(cli.make_parser().parse_args(["ops", "--device", name]))
    assert settings.device == torch.device("cuda", index)
    monkeypatch.setattr(selfcheck, "copy_bandwidth", lambda device, repeats: 1e9)
    monkeypatch.setattr(selfcheck, "check", lambda *args: iter(()))
    selfcheck.main(["--device", name])
    assert chosen == [index, index]


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
    (tmp_path / "spo_kernels" / "libspo_kernels.so").touch()  # a built tree comes before the installed package
    assert run_python("-m", "benchmarks", cwd=tmp_path).stdout.strip() == str(ours)
