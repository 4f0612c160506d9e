"""Pairs in parquet files and in datasets of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason='needs datasets: pip install "spo_kernels[data]"')

import datasets
import pyarrow
from pyarrow import parquet

from spo_train.errors import DataError
from spo_train.pair_files import Pair, open_pairs

USER = {"role": "user", "content": "Hi."}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Hello!", "Go."))
EXPECTED = [
    (1, Pair((USER,), GOOD | {"name": "Tom"}, BAD, "messages")),
    (2, Pair((USER,), GOOD, BAD, "messages")),
    (3, 'no field "rejected"'),
]
# In a table every row has every field and every message every key.
ROWS: list[dict[str, Any]] = [
    {"prompt": [USER], "chosen": [GOOD | {"name": "Tom"}], "rejected": [BAD], "score": 2},
    {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD], "score": None},
    {"prompt": [USER], "chosen": [GOOD], "rejected": None, "score": 1},
]


def read(source: str | Path, **options: Any) -> tuple[str, str, list[Any]]:
    with open_pairs(source, **options) as file:
        return file.format, file.unit, list(file.rows)


def test_conversations_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "pairs[1]*.jsonl"  # neither a pattern nor JSON
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    assert read(path) == ("parquet", "row", EXPECTED)


def test_strings_in_parquet(tmp_path: Path) -> None:
    columns = {"prompt": ["", "b"], "chosen": ["None", "1"], "rejected": ["x", "y"], "image": [b"\xff", None]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "p", row_group_size=1)
    assert read(tmp_path / "p")[2] == [
        (1, Pair("", "None", "x", "strings")),
        (2, Pair("b", "1", "y", "strings")),
    ]
    parquet.write_table(pyarrow.table({"chosen": [1], "rejected": [2]}), tmp_path / "p")
    assert read(tmp_path / "p")[2] == [(1, 'field "chosen" must be a string or a list of messages: got int')]


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "p")
    content = (tmp_path / "p").read_bytes()
    for damaged in (content[:-20], content[:4] + b"\0" * 60 + content[64:], b"PAR1PAR1"):
        (tmp_path / "p").write_bytes(damaged)
        with pytest.raises(DataError, match="p is not a whole parquet file"):
            read(tmp_path / "p")


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def load_dataset(name: str, *, split: str, streaming: bool) -> Any:
        assert (name, split, streaming) == ("owner/name", "test", True)
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name", split="test") == ("dataset", "row", EXPECTED)


def test_a_dataset_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="there is no file nobody/nothing, and no dataset of that name can be read"):
        read("nobody/nothing")
