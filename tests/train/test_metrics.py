from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest
import torch

from spo_train.files import read_jsonl
from spo_train.metrics import JsonlLog, PartTimer, progress_bar


def test_records_are_on_the_disk_at_once_and_a_resumed_log_drops_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = JsonlLog(path)
    records = [{"step": step, "loss": step / 3} for step in range(1, 5)]
    for record in records:
        log.write(record)
        assert read_jsonl(path)[-1] == record
    assert JsonlLog(path, keep_to_step=2).records == records[:2] == read_jsonl(path)
    assert JsonlLog(path).records == read_jsonl(path) == []


def test_an_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    log = JsonlLog(path, keep_to_step=2)
    log.write({"step": 3})
    assert [record["step"] for record in read_jsonl(path)] == [1, 2, 3]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is not JSON"):
        read_jsonl(path)
    assert read_jsonl(tmp_path / "absent.jsonl") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "metrics.jsonl")
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write .*metrics\.jsonl: No space left") as caught:
        log.write({"step": 1})
    assert caught.value.errno == errno.ENOSPC


def test_part_timer_adds_up() -> None:
    timer = PartTimer(torch.device("cpu"))
    for _ in range(2):
        with timer("nap"):
            time.sleep(0.01)
    assert timer.seconds["nap"] >= 0.02
    assert set(timer.seconds) == {"nap"}


def test_part_timer_waits_for_the_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    def wait(device: torch.device) -> None:
        waits.append(device)
        time.sleep(0.01)

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    on_cpu, on_gpu = PartTimer(torch.device("cpu")), PartTimer(torch.device("cuda", 1))
    for timer in (on_cpu, on_gpu):
        with timer("part"):
            pass
    assert on_cpu.seconds["part"] < 0.01 <= on_gpu.seconds["part"]
    assert on_gpu.total() >= 0.03
    assert waits == [torch.device("cuda", 1)] * 4


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(total=3, desc="work") as bar:
        bar.update(3)
    assert capsys.readouterr() == ("", "")
