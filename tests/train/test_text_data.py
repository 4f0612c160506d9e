from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from spo_train.text_data import TokenSequences, read_corpus
from spo_train.tokenizer import Tokenizer


@pytest.mark.parametrize("max_length", [2, 7, 600])
def test_windows_make_every_token_a_target_once(story_texts: list[str], tokenizer: Tokenizer, max_length: int) -> None:
    texts = ["", "a", *story_texts[:5]]
    data = TokenSequences.encode(texts, tokenizer, max_length, chunk=2)
    batch = data.batch(np.arange(len(data)), tokenizer.pad_id, "cpu")
    assert batch.tokens.shape[1] <= max_length
    assert batch.lengths.min() >= 2
    labels = batch.labels()
    targets = Counter(labels[labels >= 0].tolist())
    assert targets == Counter(i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_id])
    if max_length == 600:
        assert len(data) == len(texts)
        assert set(batch.tokens[:, 0].tolist()) == {tokenizer.bos_id}


def test_held_out_sequences_are_not_trained_on(story_texts: list[str], tokenizer: Tokenizer) -> None:
    data = TokenSequences.encode(story_texts, tokenizer, 600)
    kept, held = data.split(10, seed=0)
    assert (len(kept), len(held)) == (110, 10)
    assert not set(kept.starts) & set(held.starts)
    assert set(kept.starts) | set(held.starts) == set(data.starts)
    assert set(data.split(10, seed=1)[1].starts) != set(held.starts)
    assert len(data.split(1000, seed=0)[1]) == 12


def test_neighbours_in_a_batch_have_similar_lengths(story_texts: list[str], tokenizer: Tokenizer) -> None:
    data = TokenSequences.encode(story_texts, tokenizer, 600)
    order = data.by_length(seed=0)
    assert sorted(order) == list(range(len(data)))
    spread = [np.ptp(data.lengths[order[i : i + 8]]) for i in range(0, 112, 8)]
    assert np.mean(spread) < 0.5 * np.ptp(data.lengths)
    assert list(order) != list(np.argsort(data.lengths, kind="stable"))


def test_read_corpus_from_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes("\ufeffsecond é\n\n third \n".encode())
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "sub" / "c.txt").write_text("fourth")
    (tmp_path / "notes.md").write_text("not taken from a folder")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    whole = read_corpus([tmp_path])
    assert whole.documents == ["first", "second é\n\n third", "fourth"]
    assert whole.skipped == [f"{tmp_path / 'empty.txt'}: empty", f"{tmp_path / 'latin.txt'}: not UTF-8 at byte 3"]
    assert read_corpus([tmp_path / "b.txt", tmp_path / "notes.md"], per_line=True).documents == [
        "second é",
        "third",
        "not taken from a folder",
    ]


def test_read_corpus_without_usable_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        read_corpus([tmp_path / "absent"])
    with pytest.raises(ValueError, match=r"no usable text in .*\(no .txt files\)"):
        read_corpus([tmp_path])
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"no usable text in .*x.txt: not UTF-8"):
        read_corpus([tmp_path])
