"""Files of preference pairs in the formats that people have: each row becomes a `Pair`, or the reason why it cannot.

The content tells the format of a file, not its name: JSON lines, one JSON array, CSV, parquet, and the first three
compressed by gzip. A dataset of the Hugging Face hub is read by its name. docs/data.md has examples of all of them.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from spo_train.chat import HH_TURN
from spo_train.errors import DataError, MissingPackageError, RowError
from spo_train.files import StrPath, is_hub_name
from spo_train.metrics import progress_bar
from spo_train.protocol import Message

RESPONSES = ("chosen", "rejected")
FIELDS = ("prompt", *RESPONSES)

GZIP = b"\x1f\x8b"
# First bytes of files that are no text, with what to say of them.
REFUSED_FILES = {
    GZIP: "is compressed by gzip twice: decompress it once",
    b"BZh": "is compressed by bzip2: decompress it, or compress it by gzip",
    b"\xfd7zXZ": "is compressed by xz: decompress it, or compress it by gzip",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: decompress it, or compress it by gzip",
    b"PK\x03\x04": "is a zip archive or a spreadsheet: unpack it, or save it as CSV",
    b"ARROW1": "is an Arrow file: write it as parquet",
    b"\xff\xff\xff\xff": "is an Arrow stream: write it as parquet",
    b"\xff\xfe": "is UTF-16: convert it to UTF-8",
    b"\xfe\xff": "is UTF-16: convert it to UTF-8",
}
PARQUET = b"PAR1"
BOM = b"\xef\xbb\xbf"
DELIMITERS = ",\t;|"
# Characters of a header in which the names of CSV columns are looked for.
MOST_HEADER = 65536

# A list of messages that was turned into a string, by Python or by JSON.
LIST_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")

STRINGS, MESSAGES, HH = "strings", "messages", "Human/Assistant texts"


class Pair(NamedTuple):
    """A preference pair: two strings that follow a string, or two assistant messages that follow messages.

    Attributes:
        prompt: a string, "" for none, or one message or more.
        chosen, rejected: the responses, strings after a string and messages after messages.
        kind: how the file has it, one of `STRINGS`, `MESSAGES` and `HH`.
    """

    prompt: str | Sequence[Message]
    chosen: str | Message
    rejected: str | Message
    kind: str

    def repeats_prompt(self) -> bool:
        """Return whether both responses are strings that begin with the prompt."""
        prompt = self.prompt
        return isinstance(prompt, str) and all(
            isinstance(response, str) and response.startswith(prompt) for response in (self.chosen, self.rejected)
        )


class PairRows(NamedTuple):
    """The rows of a file.

    Attributes:
        format: the file's format.
        unit: what the numbers of rows count: "line" or "row", both from 1.
        rows: `(number, pair)`; in place of a pair the reason why there is none.
    """

    format: str
    unit: str
    rows: Iterator[tuple[int, Pair | str]]


@contextmanager
def open_pairs(source: StrPath, *, split: str = "train") -> Iterator[PairRows]:
    """Open a file of pairs, or a dataset of the Hugging Face hub.

    Args:
        source: a file; or "owner/name" of a dataset, if there is no such file.
        split: of the dataset.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: the file as a whole is in no known format, or damaged.
        MissingPackageError: the format needs a package that is not installed.
    """
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{path} is a folder: name a file of pairs in it")
    if not path.exists():
        if not is_hub_name(path) or path.suffix.lower() in (".jsonl", ".json", ".gz", ".csv", ".parquet"):
            raise FileNotFoundError(f"{path} does not exist")
        yield PairRows("dataset", "row", _pairs_of(_hub_rows(str(source), split)))
        return
    with (
        open(path, "rb") as file,
        progress_bar(total=path.stat().st_size, desc="reading pairs", unit="B", unit_scale=True) as bar,
    ):
        try:
            found = _open_file(path, file)

            def rows_with_progress() -> Iterator[tuple[int, Pair | str]]:
                for row in found.rows:
                    bar.update(file.tell() - bar.n)
                    yield row

            yield found._replace(rows=rows_with_progress())
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is damaged: {error}") from error


def _open_file(path: Path, file: io.BufferedReader) -> PairRows:
    start = file.read(8)
    file.seek(0)
    if start.startswith(PARQUET):
        return PairRows("parquet", "row", _pairs_of(_parquet_rows(path, file)))
    stream: io.BufferedReader | gzip.GzipFile = file
    packed = ""
    if start.startswith(GZIP):
        stream, packed = gzip.GzipFile(fileobj=file), ", gzip"
    start = stream.peek(8)[:8]
    for magic, what in REFUSED_FILES.items():
        if start.startswith(magic):
            raise DataError(f"{path} {what}")
    if start.startswith(PARQUET):
        raise DataError(f"{path} is parquet, compressed by gzip: decompress it")
    if start.startswith(BOM):
        stream.read(len(BOM))
    blank_lines, first = 0, b""
    for line in stream:
        if line.strip():
            first = line
            break
        blank_lines += 1
    if first.lstrip().startswith(b"["):
        return PairRows("JSON array" + packed, "row", _pairs_of(_array_rows(path, first + stream.read(), blank_lines)))
    if first.strip() == b"{":
        raise DataError(
            f"{path} begins with a JSON object over several lines: write one object a line, or an array of objects"
        )
    delimiter = _csv_delimiter(first)
    if delimiter is not None:
        rows = _csv_rows(path, itertools.chain([first], stream), blank_lines, delimiter)
        return PairRows("CSV" + packed, "line", _pairs_of(rows))
    lines = itertools.chain([first], stream)
    return PairRows("JSON lines" + packed, "line", _pairs_of(_json_lines(lines, blank_lines)))


def _pairs_of(rows: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Pair | str]]:
    for number, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            yield number, normalized(row)
        except RowError as error:
            yield number, str(error)


def _json_lines(lines: Iterable[bytes], blank_lines: int) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=blank_lines + 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield number, RowError(f"not UTF-8: byte {error.object[error.start]:#04x} at column {error.start + 1}")
        except (json.JSONDecodeError, RecursionError) as error:
            yield number, RowError(f"not JSON: {error}")


def _array_rows(path: Path, content: bytes, blank_lines: int) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        line = error.lineno + blank_lines
        raise DataError(
            f"{path} begins like a JSON array and is none: {error.msg} at line {line}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path} begins like a JSON array and is nested too deeply") from error
    return enumerate(rows, start=1)


def _csv_delimiter(header: bytes) -> str | None:
    """Return the delimiter with which a line is a header that names both responses, or None."""
    text = header[:MOST_HEADER].decode("utf-8", errors="replace")
    for delimiter in DELIMITERS:
        try:
            names = next(csv.reader([text], delimiter=delimiter), [])
        except csv.Error:
            continue
        if set(RESPONSES) <= set(names):
            return delimiter
    return None


def _csv_rows(path: Path, lines: Iterable[bytes], blank_lines: int, delimiter: str) -> Iterator[tuple[int, Any]]:
    def texts() -> Iterator[str]:
        for number, line in enumerate(lines, start=blank_lines + 1):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte {error.object[error.start]:#04x} at column {error.start + 1}"
                raise DataError(f"{path}, line {number}, is not UTF-8: {byte}") from error

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    # A response may be longer than 131072 characters, the limit unless it is raised.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        header = next(reader)
        if len(set(header)) < len(header):
            raise DataError(f"{path} has several columns of one name: {', '.join(header)}")
        while True:
            number = blank_lines + reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            if len(values) == len(header):
                yield number, dict(zip(header, values, strict=True))
            elif values:
                yield number, RowError(f"{len(values)} columns where the header has {len(header)}")
    except csv.Error as error:
        raise DataError(f"{path}, line {blank_lines + reader.line_num}, is not CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingPackageError(f'{path} is parquet, which needs pip install "spo_kernels[data]"') from error
    try:
        table = parquet.ParquetFile(file)
        columns = [name for name in table.schema_arrow.names if name in FIELDS]
        batches = table.iter_batches(batch_size=256, columns=columns)
        yield from _without_nulls(row for batch in batches for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a whole parquet file: {error}") from error


def _hub_rows(name: str, split: str) -> Iterator[tuple[int, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            f'{name} does not exist; as a dataset of the Hugging Face hub it needs pip install "spo_kernels[data]"'
        ) from error
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        yield from _without_nulls(rows)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"there is no file {name}, and no dataset of that name can be read from the hub: {reason}"
        ) from error


def _without_nulls(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
    """Number rows of tables, in which a null stands for a field that the row does not have."""
    for number, row in enumerate(rows, start=1):
        yield number, {name: value for name, value in row.items() if value is not None}


def normalized(record: Any) -> Pair:
    """Return the pair that a row holds.

    Args:
        record: what the file has, an object with "chosen", "rejected" and perhaps "prompt". Further fields are ignored.

    Raises:
        RowError: the row is no pair, or could be read in two ways. The message names the field.
    """
    if not isinstance(record, dict):
        raise RowError(f"not an object: {type(record).__name__}")
    for name in RESPONSES:
        if name not in record:
            raise RowError(f'no field "{name}"')
    fields = {name: _field(name, record[name]) for name in FIELDS if name in record}
    prompt, chosen, rejected = fields.get("prompt"), fields["chosen"], fields["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _split_hh(chosen, rejected)
        if isinstance(prompt, str):
            return Pair(prompt, chosen, rejected, STRINGS)
        replies: list[Message] = [{"role": "assistant", "content": text} for text in (chosen, rejected)]
        return _conversation(prompt, replies[:1], replies[1:])
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowError("chosen and rejected differ in kind: one is a string, the other a list of messages")
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    if isinstance(prompt, list):
        if all(messages[: len(prompt)] == prompt for messages in (chosen, rejected)):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return _conversation(prompt, chosen, rejected)
    if isinstance(prompt, str) and len(chosen) == len(rejected) == 1:
        return _conversation([{"role": "user", "content": prompt}], chosen, rejected)
    shared = _common_prefix(chosen, rejected)
    if not shared:
        raise RowError(
            'no prompt: chosen and rejected begin with different messages, and there is no field "prompt"'
            if prompt is None
            else 'field "prompt" is a string, and chosen and rejected begin with different messages'
        )
    if isinstance(prompt, str) and (shared[-1]["role"] != "user" or shared[-1]["content"] != prompt):
        raise RowError('field "prompt" is not the user message before the replies in chosen and rejected')
    return _conversation(shared, chosen[len(shared) :], rejected[len(shared) :])


def _field(name: str, value: Any) -> Any:
    """Return a string, or a list of messages without keys that are null."""
    if isinstance(value, str):
        _refuse_surrogates(f'field "{name}"', value)
        if LIST_AS_TEXT.match(value):
            raise RowError(
                f'field "{name}" is a list of messages written as text: store the list itself, in JSON or parquet'
            )
        return value
    if not isinstance(value, list):
        raise RowError(f'field "{name}" must be a string or a list of messages: got {type(value).__name__}')
    if not value:
        raise RowError(f'field "{name}" must hold a message at least: got an empty list')
    return [_message(f'field "{name}", message {number}', message) for number, message in enumerate(value, start=1)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowError(f'{where} must be an object with "role" and "content": got {type(message).__name__}')
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            got = f"got {type(message[key]).__name__}" if key in message else f"got {', '.join(map(str, message))}"
            raise RowError(f'{where} must have a string "{key}": {got}')
    for value in message.values():
        if isinstance(value, str):
            _refuse_surrogates(where, value)
    return {key: value for key, value in message.items() if value is not None}


def _refuse_surrogates(where: str, text: str) -> None:
    # JSON can escape half of a surrogate pair. That is no character and has no UTF-8 form.
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise RowError(f"{where} has a lone surrogate")


def _conversation(prompt: Sequence[Message], chosen: list[Message], rejected: list[Message]) -> Pair:
    if prompt[-1]["role"] == "assistant":
        raise RowError("the prompt must end with a message to reply to: got one of the assistant")
    for name, reply in zip(RESPONSES, (chosen, rejected), strict=True):
        roles = ", ".join(message["role"] for message in reply) or "none"
        if len(reply) != 1 or reply[0]["role"] != "assistant":
            raise RowError(f'field "{name}" must have one assistant message after the prompt: got {roles}')
    return Pair(tuple(prompt), chosen[0], rejected[0], MESSAGES)


def _split_hh(chosen: str, rejected: str) -> Pair:
    """Split texts of the form "Human: ... Assistant: ..." before the last reply."""
    prompts = []
    for name, text in zip(RESPONSES, (chosen, rejected), strict=True):
        turns = list(HH_TURN.finditer(text))
        if not turns or text[: turns[0].start()].strip() or "Assistant" not in [turn[1] for turn in turns]:
            raise RowError(
                f'no field "prompt", and field "{name}" has not the form "Human: ... Assistant: ..." that shows where '
                'the response begins: give a prompt, "" for none'
            )
        if turns[-1][1] != "Assistant":
            raise RowError(f'field "{name}" must end with a reply of the Assistant: got a turn of the Human')
        prompts.append(text[: turns[-1].end()])
    if prompts[0] != prompts[1]:
        raise RowError("chosen and rejected differ before their last reply")
    return Pair(prompts[0], chosen[len(prompts[0]) :], rejected[len(prompts[1]) :], HH)


def _common_prefix(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    pairs = zip(chosen, rejected, strict=False)
    return [message for message, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
