"""The formats of files of pairs, and how a row becomes a pair or the reason why it is none."""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spo_train.models
from spo_train.errors import DataError, MissingPackageError
from spo_train.files import is_hub_name
from spo_train.models.loading import load_pretrained
from spo_train.pair_data import load_pairs
from spo_train.pair_files import Pair, normalized, open_pairs
from spo_train.tokenizer import Tokenizer

USER = {"role": "user", "content": "Hi."}
SYSTEM = {"role": "system", "content": "Be kind."}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Hello!", "Go."))
HUMAN = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: A story?\n\nAssistant:"
ROWS: list[dict[str, Any]] = [
    {"prompt": "Once. ", "chosen": 'Tom, "the cat",\nran.', "rejected": "Zoë ☃ 🦊 sat."},
    {"prompt": "", "chosen": "None", "rejected": "NA"},
    {"prompt": "7", "chosen": "1", "rejected": "2"},
]
CSV = 'prompt,chosen,rejected,n\r\n"Once. ","Tom, ""the cat"",\nran.",Zoë ☃ 🦊 sat.,1\r\n,None,NA,2\r\n\r\n7,1,2,3\r\n'
TSV = 'rejected\tprompt\tchosen\nZoë ☃ 🦊 sat.\tOnce. \t"Tom, ""the cat"",\nran."\nNA\t\tNone\n2\t7\t1\n'


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path: Path) -> tuple[str, str, list[tuple[int, Pair | str]]]:
    with open_pairs(path) as file:
        return file.format, file.unit, list(file.rows)


def zipped(text: str) -> bytes:
    return gzip.compress(text.encode())


@pytest.mark.parametrize(
    ("content", "format", "unit", "numbers"),
    [
        (lines(ROWS).encode(), "JSON lines", "line", [1, 2, 3]),
        (b"\xef\xbb\xbf\n\r\n" + lines(ROWS).encode(), "JSON lines", "line", [3, 4, 5]),
        (lines(ROWS).encode()[:-1], "JSON lines", "line", [1, 2, 3]),
        (zipped(lines(ROWS)), "JSON lines, gzip", "line", [1, 2, 3]),
        (json.dumps(ROWS).encode(), "JSON array", "row", [1, 2, 3]),
        (b"\n " + json.dumps(ROWS, indent=2).encode(), "JSON array", "row", [1, 2, 3]),
        (zipped(json.dumps(ROWS)), "JSON array, gzip", "row", [1, 2, 3]),
        (CSV.encode(), "CSV", "line", [2, 4, 6]),
        (b"\xef\xbb\xbf" + CSV.encode(), "CSV", "line", [2, 4, 6]),
        (zipped(CSV), "CSV, gzip", "line", [2, 4, 6]),
        (b"\n" + TSV.encode(), "CSV", "line", [3, 5, 6]),
    ],
)
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs[1].parquet"])  # the name does not matter
def test_the_content_tells_the_format(
    content: bytes, format: str, unit: str, numbers: list[int], name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    got_format, got_unit, rows = read(tmp_path / name)
    assert (got_format, got_unit) == (format, unit)
    assert [number for number, _ in rows] == numbers
    for (_, pair), row in zip(rows, ROWS, strict=True):
        assert pair == Pair(row["prompt"], row["chosen"], row["rejected"], "strings")


def test_a_long_cell_of_csv_is_read(tmp_path: Path) -> None:
    long = "word " * 50_000
    (tmp_path / "p.csv").write_text(f"prompt,chosen,rejected\na,{long},b\n")
    ((number, pair),) = read(tmp_path / "p.csv")[2]
    assert (number, pair.chosen) == (2, long)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(ROWS).encode()[:-1], "begins like a JSON array and is none: .* at line 1, column"),
        (b"\n\n" + json.dumps(ROWS, indent=1).encode() + b"]", "is none: Extra data at line 19, column 2"),
        (b'[{"prompt": "\xff"}]', "is not UTF-8 at byte 13"),
        (b"[" * 100_000, "is nested too deeply|is none"),
        (
            json.dumps(ROWS[0], indent=2).encode(),
            "begins with a JSON object over several lines: write one object a line",
        ),
        (zipped(lines(ROWS))[:40], "is damaged: "),
        (zipped(lines(ROWS))[:-8] + b"12345678", "is damaged: "),
        (b"\x1f\x8b" + b"x" * 50, "is damaged: "),
        (gzip.compress(zipped(lines(ROWS))), "is compressed by gzip twice"),
        (b"BZh91AY", "is compressed by bzip2: decompress it"),
        (b"\xfd7zXZ\x00", "is compressed by xz"),
        (b"\x28\xb5\x2f\xfd\x00", "is compressed by zstd"),
        (b"PK\x03\x04\x00", "is a zip archive or a spreadsheet"),
        (b"ARROW1\x00\x00", "is an Arrow file: write it as parquet"),
        (lines(ROWS).encode("utf-16"), "is UTF-16: convert it to UTF-8"),
        (zipped("PAR1"), "is parquet, compressed by gzip"),
        (b'prompt,chosen,rejected\na,"b,c\n', "line 2, is not CSV: unexpected end of data"),
        (b'prompt,chosen,rejected\na,"b"c,d\n', "line 2, is not CSV: "),
        (b"prompt,chosen,rejected\na,b,c\na,\xff,c\n", "line 3, is not UTF-8: byte 0xff at column 3"),
        (b"chosen,rejected,chosen\na,b,c\n", "has several columns of one name: chosen, rejected, chosen"),
        (b"prompt,chosen,rejected\ra,b,c\r", r"no usable pairs; (?s:.*)neither .* nor CSV"),
        (b"prompt,good,bad\na,b,c\n", r"no usable pairs; (?s:.*)neither .* nor CSV with columns chosen and rejected"),
        (b"", "no usable pairs; .*: the file is empty"),
    ],
)
def test_files_that_cannot_be_read_are_refused(
    content: bytes, message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_pairs(path, tokenizer, max_length=32)
    assert str(path) in str(error.value)


def test_changed_bytes_give_pairs_or_a_data_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rng, path = random.Random(0), tmp_path / "p"
    rows = [*ROWS, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {"chosen": HUMAN + " a", "rejected": HUMAN}]
    contents = [lines(rows).encode(), json.dumps(rows).encode(), CSV.encode(), zipped(lines(rows)), rng.randbytes(200)]
    refused = []
    for _ in range(1000):
        content = bytearray(rng.choice(contents))
        for _ in range(rng.randint(1, 8)):
            place = rng.randrange(len(content))
            content[place : place + rng.choice([0, 1, 30])] = rng.randbytes(rng.choice([0, 1, 3]))
        path.write_bytes(content)
        try:
            assert load_pairs(path, tokenizer, max_length=64)[1].used > 0
        except DataError as error:
            refused.append(str(error))
    assert 100 < len(refused) < 900
    assert all(str(path) in message for message in refused)


def test_rows_of_arrays_and_csv_are_left_out_with_their_number(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "p.json").write_text(json.dumps([ROWS[0], 3, {"prompt": "", "chosen": "x"}]))
    _, report = load_pairs(tmp_path / "p.json", tokenizer, max_length=64)
    assert report.problems == [(2, "not an object: int"), (3, 'no field "rejected"')]
    assert "  row 2: not an object: int" in report.summary()
    (tmp_path / "p.csv").write_text(CSV + "a,b\n" + "a,\"[{'role': 'user'}]\",c,4\n")
    _, report = load_pairs(tmp_path / "p.csv", tokenizer, max_length=64)
    assert report.problems == [
        (7, "2 columns where the header has 4"),
        (8, 'field "chosen" is a list of messages written as text: store the list itself, in JSON or parquet'),
    ]
    assert "  line 7: 2 columns" in report.summary()


CONVERSATION = Pair((SYSTEM, USER), GOOD, BAD, "messages")


@pytest.mark.parametrize(
    ("record", "pair"),
    [
        ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, CONVERSATION),
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, CONVERSATION),
        ({"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, CONVERSATION),
        ({"prompt": "Hi.", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, CONVERSATION),
        ({"prompt": [SYSTEM, USER], "chosen": "Hello!", "rejected": "Go."}, CONVERSATION),
        ({"prompt": "Hi.", "chosen": [GOOD], "rejected": [BAD], "score": 1}, Pair((USER,), GOOD, BAD, "messages")),
        # A table has every key in every message, null where the message has none.
        ({"chosen": [USER | {"name": None}, GOOD], "rejected": [USER, BAD]}, Pair((USER,), GOOD, BAD, "messages")),
        (
            {"prompt": [USER, GOOD, USER | {"name": "Tom"}], "chosen": [GOOD | {"thinking": "."}], "rejected": [BAD]},
            Pair((USER, GOOD, USER | {"name": "Tom"}), GOOD | {"thinking": "."}, BAD, "messages"),
        ),
        (
            {"chosen": HUMAN + " Tom ran.", "rejected": HUMAN + " No."},
            Pair(HUMAN, " Tom ran.", " No.", "Human/Assistant texts"),
        ),
        (
            {"chosen": "Human: Hi.\n\nAssistant: Say Human: x", "rejected": "Human: Hi.\n\nAssistant: No."},
            Pair("Human: Hi.\n\nAssistant:", " Say Human: x", " No.", "Human/Assistant texts"),
        ),
        ({"prompt": HUMAN, "chosen": " Tom", "rejected": " No"}, Pair(HUMAN, " Tom", " No", "strings")),
    ],
)
def test_rows_become_pairs(record: dict[str, Any], pair: Pair) -> None:
    assert normalized(record) == pair


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "a", "rejected": "b"}, 'no field "prompt", and field "chosen" has not the form'),
        ({"chosen": HUMAN + " a", "rejected": "b"}, 'no field "prompt", and field "rejected" has not the form'),
        ({"chosen": "x" + HUMAN, "rejected": HUMAN}, 'no field "prompt", and field "chosen" has not the form'),
        (
            {"chosen": HUMAN + " a\n\nHuman: b", "rejected": HUMAN},
            'field "chosen" must end with a reply of the Assistant',
        ),
        ({"chosen": HUMAN + " a", "rejected": "\n\nHuman: Ho.\n\nAssistant: a"}, "differ before their last reply"),
        ({"prompt": "a", "chosen": [GOOD], "rejected": "b"}, "chosen and rejected differ in kind"),
        (
            {"prompt": [USER], "chosen": GOOD, "rejected": [BAD]},
            'field "chosen" must be a string or a list of messages: got',
        ),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, 'field "prompt" must hold a message at least'),
        ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, 'field "chosen" must hold a message at least'),
        (
            {"prompt": [USER], "chosen": ["a"], "rejected": [BAD]},
            'field "chosen", message 1 must be an object with "role"',
        ),
        (
            {"prompt": [{"from": "human", "value": "a"}], "chosen": [GOOD], "rejected": [BAD]},
            'field "prompt", message 1 must have a string "role": got from, value',
        ),
        (
            {"prompt": [USER | {"content": [{"type": "image"}]}], "chosen": [GOOD], "rejected": [BAD]},
            'field "prompt", message 1 must have a string "content": got list',
        ),
        (
            {"prompt": [USER | {"content": "\ud800"}], "chosen": [GOOD], "rejected": [BAD]},
            'field "prompt", message 1 has a lone surrogate',
        ),
        (
            {"prompt": [USER | {"name": "\ud800"}], "chosen": [GOOD], "rejected": [BAD]},
            'field "prompt", message 1 has a lone surrogate',
        ),
        ({"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD]}, 'field "chosen" must have one assistant'),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "one assistant message after the prompt: got user"),
        (
            {"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]},
            "the prompt must end with a message to reply to",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, 'field "rejected" must have one assistant message'),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are the same"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no prompt: chosen and rejected begin with different messages"),
        (
            {"prompt": "x", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            'field "prompt" is not the user message before',
        ),
        (
            {"prompt": "x", "chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
            'field "prompt" is a string, and chosen and rejected begin with different messages',
        ),
        (
            {"prompt": '[{"role": "user"}]', "chosen": "a", "rejected": "b"},
            'field "prompt" is a list of messages written',
        ),
    ],
)
def test_rows_that_are_no_pairs_say_why(record: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(lines([ROWS[0], record]))
    (_, _), (number, got) = read(path)[2]
    assert number == 2
    assert isinstance(got, str)
    assert reason in got


def test_messages_become_lines_without_a_chat_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "p.jsonl").write_text(lines([{"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}] * 2))
    pairs, report = load_pairs(tmp_path / "p.jsonl", tokenizer, max_length=64)
    assert "2 of messages as lines `role: content`" in report.summary()
    assert tokenizer.decode(pairs.prompts([0])[0]) == "system: Be kind.\nuser: Hi.\nassistant:"
    batch = pairs.batch([0])
    assert tokenizer.decode(batch.tokens[0, batch.prompt_lens[0] :].tolist()) == " Hello!"
    assert batch.tokens[0, batch.lengths[0] - 1] == tokenizer.eos_id


def test_prompts_within_the_responses_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": p, "chosen": p + "Tom ran.", "rejected": p + "Lily sat."} for p in ("Hi. ", "Once. ")]
    (tmp_path / "p.jsonl").write_text(lines(rows))
    with pytest.raises(DataError, match="each response begins with its prompt: take the prompts out of chosen"):
        load_pairs(tmp_path / "p.jsonl", tokenizer, max_length=64)
    (tmp_path / "p.jsonl").write_text(lines([*rows, ROWS[0]]))
    assert load_pairs(tmp_path / "p.jsonl", tokenizer, max_length=64)[1].used == 3


def test_names_of_the_hub_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    names = ["owner/name", "a-b/c_d.e-1.5"]
    paths = ["name", "runs/spo", "./owner/name", "/owner/name", "a/b/c", "owner/..", "~/name", "owner/na me", ""]
    assert [name for name in names + paths if is_hub_name(name)] == names
    with pytest.raises(FileNotFoundError, match=r"^runs/spo does not exist$"):
        load_pretrained("runs/spo")
    for path in ("runs/pairs", "owner/pairs.jsonl"):
        with pytest.raises(FileNotFoundError, match=f"^{path} does not exist$"), open_pairs(path):
            pass
    with pytest.raises(DataError, match="runs is a folder: name a file of pairs in it"), open_pairs("runs"):
        pass


def hf_folder(folder: Path) -> str:
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    return str(folder)


def read_rows(path: str | Path) -> None:
    with open_pairs(path) as file:
        list(file.rows)


@pytest.mark.parametrize(
    ("package", "use", "message"),
    [
        ("transformers", lambda f: load_pretrained(hf_folder(f)), r"is a model of transformers.*spo_kernels\[hf\]"),
        ("transformers", lambda f: load_pretrained("owner/name"), r"^owner/name does not exist; .*spo_kernels\[hf\]"),
        ("datasets", lambda f: read_rows("owner/name"), r"^owner/name does not exist; .*spo_kernels\[data\]"),
        ("pyarrow", lambda f: read_rows(f / "p"), r"p is parquet, which needs pip install \"spo_kernels\[data\]\""),
    ],
)
def test_a_missing_package_is_named(
    package: str, use: Callable[[Path], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p").write_bytes(b"PAR1....PAR1")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "spo_train.models.huggingface", raising=False)
    monkeypatch.delattr(spo_train.models, "huggingface", raising=False)
    with pytest.raises(MissingPackageError, match=message):
        use(tmp_path)
