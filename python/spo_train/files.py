"""Files: their names in the folder of a run, atomic writing, and reading JSON with errors that name the file."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

StrPath = str | os.PathLike[str]

# In the folder of a run.
CHECKPOINT_FILE, METRICS_FILE, EVALUATIONS_FILE = "checkpoint.safetensors", "metrics.jsonl", "evaluations.jsonl"
RUN_FILE, STORIES_FILE, MODEL_FOLDER = "run.json", "stories.jsonl", "model"
# In the folder of a model.
CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.model"

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(source: StrPath) -> bool:
    """Return whether a name without file or folder can be owner/name of the Hugging Face hub.

    Where the owner's name is that of a folder here, the name is taken for a path with a mistake in it.
    """
    return HUB_NAME.fullmatch(str(source)) is not None and not Path(source).parent.exists()


def write_atomically(path: Path, content: bytes | Callable[[IO[bytes]], None]) -> None:
    """Replace `path` by new content in one step: a temporary file beside it, fsync, rename, fsync of the folder.

    A crash or a full disk leaves the old file as it was.

    Args:
        path: file to create or replace; its folder is created.
        content: the bytes, or a function that writes them to the open temporary file.

    Raises:
        OSError: the file cannot be written, for instance because the disk is full; the message names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; these are ordinary outputs.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write one JSON object, indented, atomically."""
    write_atomically(path, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON objects, one a line, atomically."""
    write_atomically(path, "".join(map(json_line, records)).encode())


def json_line(record: Mapping[str, Any]) -> str:
    """Return a JSON object as one line, with its line break."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, not JSON, or not an object; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} must hold a JSON object, got {record!r}")
    return record


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read all records of a JSONL file, without an unfinished last line; [] if there is no such file.

    Raises:
        ValueError: a line before the last is not JSON; the message names file and line.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                records.append(json.loads(line))
        except json.JSONDecodeError as error:
            # A killed process leaves at most its last line incomplete, and that line has no newline.
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
    return records


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
