from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from spo_train.pair_data import BatchOrder, DataError, PairDataset, load_pairs
from spo_train.protocol import IGNORE_INDEX
from spo_train.tokenizer import Tokenizer

GOOD = {"prompt": "", "chosen": "Lily was happy.", "rejected": "Tom was sad."}


def write(path: Path, *lines: bytes | dict) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_batch_is_bos_prompt_response_eos(tmp_path: Path, tokenizer: Tokenizer) -> None:
    second = {"prompt": "Once. ", "chosen": "Tom ran.", "rejected": "Tom ran home and was very, very glad."}
    dataset, report = load_pairs(write(tmp_path / "p.jsonl", GOOD, second), tokenizer, max_length=48)
    assert (len(dataset), report.used, report.problems) == (2, 2, [])
    batch = dataset.batch([1, 0])
    expected = [second["chosen"], GOOD["chosen"], second["rejected"], GOOD["rejected"]]
    prompts = [second["prompt"], "", second["prompt"], ""]
    labels = batch.labels()
    for row, (prompt, text) in enumerate(zip(prompts, expected, strict=True)):
        start, end = int(batch.prompt_lens[row]), int(batch.lengths[row])
        tokens = batch.tokens[row].tolist()
        assert tokens[0] == tokenizer.bos_id
        assert tokens[end - 1] == tokenizer.eos_id
        assert set(tokens[end:]) <= {tokenizer.pad_id}
        assert tokens[1:start] == tokenizer.encode(prompt)
        assert tokenizer.decode(tokens[start : end - 1]) == text
        assert (labels[row] != IGNORE_INDEX).nonzero().flatten().tolist() == list(range(start - 1, end - 1))
    assert batch.tokens.shape[1] == batch.lengths.max()
    assert dataset.prompts([1, 0]) == [tokenizer.encode("Once. "), []]


def test_bad_lines_are_left_out_by_number_with_a_reason(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines: list[tuple[bytes | dict, str | None]] = [
        (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), None),  # a byte order mark
        (b"{not json", "not JSON"),
        (b"   ", None),
        (b"[1, 2]", "not an object: list"),
        ({"prompt": "", "chosen": "x"}, 'no field "rejected"'),
        (GOOD | {"prompt": None}, 'field "prompt" must be a string or a list of messages: got NoneType'),
        (GOOD | {"chosen": 3}, 'field "chosen" must be a string or a list of messages: got int'),
        (b'{"prompt": "", "chosen": "a\xff", "rejected": "b"}', "not UTF-8: byte 0xff at column 28"),
        (b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', 'field "prompt" has a lone surrogate'),
        (GOOD | {"rejected": GOOD["chosen"]}, "chosen and rejected are the same"),
        (GOOD | {"prompt": "no " * 60}, "prompt too long"),
        (GOOD | {"chosen": "Zoë saw a ☃ 🦊.", "extra": {"ignored": True}}, None),
        (GOOD | {"rejected": ""}, None),  # only an eos
    ]
    path = write(tmp_path / "p.jsonl", *(line for line, _ in lines))
    dataset, report = load_pairs(path, tokenizer, max_length=48)
    expected = [(number, reason) for number, (_, reason) in enumerate(lines, start=1) if reason]
    assert [number for number, _ in report.problems] == [number for number, _ in expected]
    for (_, got), (_, reason) in zip(report.problems, expected, strict=True):
        assert got.startswith(reason)
    assert len(dataset) == report.used == 3
    summary = report.summary(most=2)
    assert "3 pairs, lines left out: 9" in summary
    assert "line 2: not JSON" in summary
    assert "line 5" not in summary
    assert '1 x no field "rejected"' in summary


def test_long_responses_are_truncated_or_dropped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = {"prompt": "Hi. ", "chosen": "Lily was happy. " * 20, "rejected": "Tom was sad."}
    tail = GOOD | {"chosen": "Lily was happy. " * 20 + "A", "rejected": "Lily was happy. " * 20 + "B"}
    path = write(tmp_path / "p.jsonl", GOOD, long, tail)
    dataset, report = load_pairs(path, tokenizer, max_length=32)
    assert (report.used, report.truncated) == (2, 1)
    assert report.problems == [(3, "chosen and rejected are the same: as far as they fit")]
    batch = dataset.batch([1])
    assert batch.lengths[0] == 32
    assert batch.tokens[0, -1] != tokenizer.eos_id
    assert batch.tokens[1, batch.lengths[1] - 1] == tokenizer.eos_id

    _, report = load_pairs(path, tokenizer, max_length=32, too_long="drop")
    assert (report.used, report.truncated) == (1, 0)
    assert [number for number, reason in report.problems if "too long" in reason] == [2, 3]


@pytest.mark.parametrize("lines", [(), (b"", b"  "), (b"nope", b"{}")])
def test_a_file_with_nothing_usable_is_an_error(tmp_path: Path, tokenizer: Tokenizer, lines: tuple[bytes, ...]) -> None:
    with pytest.raises(DataError, match=r"no usable pairs.*p\.jsonl"):
        load_pairs(write(tmp_path / "p.jsonl", *lines), tokenizer, max_length=32)


def test_missing_file_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load_pairs(tmp_path / "nowhere.jsonl", tokenizer, max_length=32)


def test_fingerprint_tells_data_apart() -> None:
    def fingerprint(*pairs: tuple[list[int], list[int], list[int]]) -> int:
        return PairDataset(pairs, bos_id=1, pad_id=0).fingerprint

    a, b = ([5], [6, 2], [7, 2]), ([5, 6], [2], [7, 2])
    assert fingerprint(a) == fingerprint(a)
    assert len({fingerprint(a), fingerprint(b), fingerprint(a, b), fingerprint(b, a)}) == 4


# 7 and 4: epochs end inside batches. 8 and 4: epochs end with batches. 3 and 8: a batch holds several epochs.
@pytest.mark.parametrize(("size", "batch_size"), [(7, 4), (8, 4), (3, 8), (1, 1)])
def test_batches_go_through_shuffled_epochs(size: int, batch_size: int) -> None:
    order = BatchOrder(size, batch_size, seed=3)
    steps = 4 * size
    stream = np.concatenate([order.indices(step) for step in range(steps)])
    epochs = stream[: len(stream) // size * size].reshape(-1, size)
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    assert max(Counter(stream.tolist()).values()) - min(Counter(stream.tolist()).values()) <= 1
    if size > 1:
        assert len({tuple(epoch) for epoch in epochs}) > 1
    for step in (steps - 1, 0, steps // 2):
        resumed = BatchOrder(size, batch_size, seed=3).indices(step)
        np.testing.assert_array_equal(resumed, stream[step * batch_size : (step + 1) * batch_size])
    if size > 3:
        other = np.concatenate([BatchOrder(size, batch_size, seed=4).indices(step) for step in range(steps)])
        assert (other != stream).any()
