from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from spo_train import report

SPO = {"method": "spo", "alpha": 0.1, "beta": 0.03}
DPO = {"method": "dpo", "alpha": 0.1, "beta": 0.3}


def write_run(folder: Path, config: dict, rates: list[float], *, fluency: bool = True, stories: int = 2) -> Path:
    folder.mkdir(parents=True)
    settings = {"samples": 256, "reference_samples": 512}
    (folder / "run.json").write_text(json.dumps({"config": config, "evaluate": settings}))
    records = [
        {
            "step": 50 * i,
            "win_rate": rate,
            "win_rate_low": rate - 0.03,
            "win_rate_high": rate + 0.03,
            "kl": 3.0 * i,
            "score": 5 + rate,
            "distinct_2": 0.25,
            "unique": 0.98,
            "length": 90.4,
        }
        | ({"fluency": 0.99 - 0.01 * i} if fluency else {})
        for i, rate in enumerate(rates)
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    told = [
        {"before": text(f"Before {i}.", 4), "after": text(f"After {config['method']} {i}.", 9)} for i in range(stories)
    ]
    (folder / "stories.jsonl").write_text("".join(json.dumps(record) + "\n" for record in told))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "seconds": 0.5}) + "\n" for i in range(3)))
    return folder


def text(words: str, score: float) -> dict:
    return {"text": words, "features": {"score": score}}


@pytest.fixture
def runs(tmp_path: Path) -> list[report.Run]:
    folders = [
        write_run(tmp_path / "spo", SPO, [0.5, 0.8, 0.9, 0.85]),
        write_run(tmp_path / "dpo", DPO, [0.5, 0.7, 0.6, 0.55]),
    ]
    return [report.read_run(folder) for folder in folders]


def test_best_and_last(runs: list[report.Run]) -> None:
    assert [(run.best["step"], run.last["step"]) for run in runs] == [(100, 150), (50, 150)]


def test_best_is_not_the_untrained_model(tmp_path: Path) -> None:
    run = report.read_run(write_run(tmp_path / "worse", SPO, [0.5, 0.4, 0.45]))
    assert run.best["step"] == 100


def test_runs_of_the_same_settings_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, config, [0.5, 0.6]) for name, config in [("a", SPO), ("b", SPO), ("c", DPO)]]
    labels = [run.label.split(", ")[-1] for run in report.read_runs(folders)]
    assert labels == ["β = 0.03 (a)", "β = 0.03 (b)", "β = 0.3"]


def test_table_has_the_numbers(runs: list[report.Run]) -> None:
    table = report.markdown_table(runs)
    lines = table.split("\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    spo = dict(zip(cells[0], cells[2], strict=True))
    assert spo["run"] == "SPO, α = 0.1, β = 0.03"  # noqa: RUF001 (the paper's letter)
    assert spo["best win rate"] == "90.0% (87.0 to 93.0)"
    assert spo["at step"] == "100"
    assert spo["final win rate"] == "85.0% (82.0 to 88.0)"
    assert (spo["KL at best"], spo["final KL"], spo["fluency"]) == ("6.0", "9.0", "0.960")
    assert spo["s a step"] == "0.50"
    assert len({len(line) for line in lines[:4]}) == 1
    assert "sampling error" in table
    rows = list(csv.DictReader(report.csv_table(runs).splitlines()))
    assert len(rows) == 8
    assert float(rows[2]["win_rate"]) == 0.9
    assert rows[7]["run"] == "DPO, β = 0.3"


def test_report_writes_figure_tables_and_stories(runs: list[report.Run], tmp_path: Path) -> None:
    files = report.write_report(runs, tmp_path / "out", stories=1)
    assert [file.name for file in files] == ["win_rate.png", "results.md", "results.csv", "stories.md"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    stories = files[3].read_text()
    assert "> Before 0." in stories
    assert "> After spo 0." in stories
    assert "> After dpo 0." in stories
    assert "Before 1." not in stories


def test_figure_draws_curves_bands_and_the_reference_line(
    runs: list[report.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(report.plt, "close", drawn.append)
    report.draw_figure(runs)
    main, upper, lower = drawn[0].axes
    curves = [line for line in main.get_lines() if len(line.get_xdata()) == 4]
    assert [list(line.get_ydata()) for line in curves] == [[0.5, 0.8, 0.9, 0.85], [0.5, 0.7, 0.6, 0.55]]
    assert list(curves[0].get_xdata()) == [0, 50, 100, 150]
    bands = [area.get_paths()[0].get_extents() for area in main.collections]
    assert [(round(band.y0, 2), round(band.y1, 2)) for band in bands] == [(0.47, 0.93), (0.47, 0.73)]
    level = [line for line in main.get_lines() if list(line.get_ydata()) == [0.5, 0.5]]
    assert len(level) == 1
    assert level[0].get_linestyle() == "--"
    assert list(upper.get_lines()[0].get_ydata()) == [0, 3, 6, 9]
    assert lower.get_title(loc="left") == "Fluency"
    assert "sampling error" in drawn[0].get_supxlabel()
    assert [entry.get_text() for entry in drawn[0].legends[0].get_texts()] == [run.label for run in runs]


def test_a_judge_without_fluency_shows_its_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [report.read_run(write_run(tmp_path / "run", SPO, [0.5, 0.6], fluency=False, stories=0))]
    drawn = []
    monkeypatch.setattr(report.plt, "close", drawn.append)
    report.draw_figure(runs)
    assert drawn[0].axes[2].get_title(loc="left") == "Judge's score"
    assert [file.name for file in report.write_report(runs, tmp_path / "out")] == [
        "win_rate.png",
        "results.md",
        "results.csv",
    ]


@pytest.mark.parametrize("rates", [[0.5], [math.nan, 0.5], [0.0, 1.0]])
def test_figure_of_odd_runs(tmp_path: Path, rates: list[float]) -> None:
    assert report.draw_figure([report.read_run(write_run(tmp_path / "run", SPO, rates))])


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        report.read_run(tmp_path)
    folder = write_run(tmp_path / "run", SPO, [])
    with pytest.raises(ValueError, match="no evaluations yet"):
        report.read_run(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not valid JSON"):
        report.read_run(folder)
