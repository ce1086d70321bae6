"""Corpora in, documents out.

Reads jsonl, json, csv, tsv, parquet, txt (also .gz and .zst) and the chitchat data set, from local paths, globs or
installed packages. A row becomes a document: a conversation, its label, and an id that is the hash of its content, so
that splits, subsets and joins depend neither on order nor on position.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fac_jax.config import DataSet, Source, suggest
from fac_jax.errors import UserError

log = logging.getLogger(__name__)
USER = "user"
POSITIVE_ABOVE = 0.5
"""A label above this is positive."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """A conversation with its label; `id` is 16 hex digits of the SHA-256 of its turns, so it is fixed by content."""

    id: str
    turns: tuple[Turn, ...]
    label: float | None
    source: str

    @property
    def text(self) -> str:
        """The user's turns, joined by blank lines."""
        return "\n\n".join(turn.content for turn in self.turns if turn.role == USER)


def resolve(path: str) -> list[Path]:
    """Files meant by a path, a glob, or `pkg://PACKAGE/GLOB` (the package is located, never imported)."""
    pattern = path
    if path.startswith("pkg://"):
        package, _, inside = path.removeprefix("pkg://").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"{path}: the package {package!r} is not installed in this environment; "
                "launch/quickstart.sh installs the quickstart's data packages (launch/quickstart-data.txt)"
            )
        pattern = str(Path(next(iter(spec.submodule_search_locations))) / inside)
    elif "://" in path:
        raise UserError(f"{path}: only local paths, globs and pkg:// are read; copy the files to a local folder first")
    found = sorted(Path(name) for name in glob(str(Path(pattern).expanduser()), recursive=True))
    files = [file for file in found if file.is_file()]
    if not files:
        raise UserError(f"{path}: no such file; mend the path")
    return files


def document_hash(document_id: str, salt: str) -> float:
    """Uniform in [0, 1), fixed by the document's content and `salt`; splits made with it do not depend on order."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{document_id}".encode()).digest()[:8], "big") / 2**64


def make_document(turns: Iterable[Turn], label: float | None, source: str) -> Document:
    """A document whose id is the hash of its turns."""
    turns = tuple(turns)
    content = json.dumps([(turn.role, turn.content) for turn in turns], ensure_ascii=False)
    return Document(hashlib.sha256(content.encode()).hexdigest()[:16], turns, label, source)


def read_documents(dataset: DataSet, name: str, skipped: list[str] | None = None) -> Iterator[Document]:
    """Documents of a data set in file order, each content once.

    A malformed row raises UserError with its file and row, or with `on_bad_row: skip` is logged, appended to `skipped`
    and left out. Raises UserError when nothing is left.
    """
    seen: set[str] = set()
    for source in dataset.sources:
        taken = 0
        for document in _source_documents(source, dataset.on_bad_row, skipped if skipped is not None else []):
            if source.limit is not None and taken >= source.limit:
                break
            low, high = source.split
            if not low <= document_hash(document.id, "split") < high:
                continue
            if document_hash(document.id, "sample") >= dataset.sample or document.id in seen:
                continue
            seen.add(document.id)
            taken += 1
            yield document
    if not seen:
        raise UserError(
            f"data.{name} has no documents: {', '.join(s.path for s in dataset.sources) or 'it lists no sources'} "
            f"gave nothing under its split, sample ({dataset.sample}) and limit; widen them or mend the path"
        )


def _source_documents(source: Source, on_bad_row: str, skipped: list[str]) -> Iterator[Document]:
    """Documents of every file. A row may be left out; a file that cannot be read to its end always stops the run."""
    for file in resolve(source.path):
        for where, row in _read_rows(file, source):
            try:
                if isinstance(row, UserError):
                    raise row
                document = _row_document(row, source, where)
            except UserError as error:
                if on_bad_row == "stop":
                    raise UserError(
                        f"{error}; mend the row, or pass --on-bad-row skip to count, list and leave out such rows"
                    ) from None
                skipped.append(str(error))
                log.warning("left out: %s", error)
            else:
                yield document


def _row_document(row: Any, source: Source, where: str) -> Document:
    if isinstance(row, tuple):  # turns made by a format of its own
        return make_document(row, source.constant_label, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object with fields, this one is {type(row).__name__}")
    if source.text not in row:
        raise UserError(
            f"{where}: no field {source.text!r}{suggest(source.text, row)}; it has {', '.join(map(str, row))}"
        )
    turns = _turns(row[source.text], where)
    label = source.constant_label if source.label is None else _label(row, source.label, where)
    return make_document(turns, label, where)


def _turns(value: Any, where: str) -> tuple[Turn, ...]:
    if isinstance(value, str):
        value = [{"role": USER, "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: the text is {value!r}; it must be text or a list of {{role, content}} messages")
    turns = []
    for message in value:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{where}: a message must have a role and a content, this one is {str(message)[:80]!r}")
        if content.strip():
            turns.append(Turn(role, content.strip()))
    if any("\ud800" <= character <= "\udfff" for turn in turns for character in turn.content):
        raise UserError(f"{where}: the text holds half of a UTF-16 pair, which is no character")
    if not any(turn.role == USER for turn in turns):
        raise UserError(f"{where}: the text is empty, or no turn is a user's")
    return tuple(turns)


def _label(row: dict[str, Any], name: str, where: str) -> float:
    value = row.get(name)
    if isinstance(value, str):
        value = {"true": 1.0, "false": 0.0}.get(value.strip().lower(), value)
    try:
        label = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"{where}: the label {name!r} is {value!r}; it must be a number or true/false") from None
    if not math.isfinite(label):
        raise UserError(f"{where}: the label {name!r} is {value!r}; it must be finite")
    return label


def _read_rows(file: Path, source: Source) -> Iterator[tuple[str, Any]]:
    """Rows of a file, each with its place; a row that cannot be parsed comes as the UserError that says so."""
    kind = _format(file, source)
    if kind == "parquet":
        for index, row in enumerate(_parquet_rows(file)):
            yield f"{file.name}:{index + 1}", row
    elif kind in ("json", "chitchat"):
        yield from _json_rows(file, kind)
    else:
        with _readable(file), _open_text(file, "surrogateescape") as lines:
            for _ in range(source.skip_lines):
                lines.readline()
            if kind in ("csv", "tsv"):
                reader = csv.DictReader(lines, delimiter="," if kind == "csv" else "\t", strict=True)
                yield from _csv_rows(file, reader, source.skip_lines)
            else:
                yield from _line_rows(file, lines, kind, source.text)


def _format(file: Path, source: Source) -> str:
    if source.format != "auto":
        return source.format
    ending = next((s for s in reversed(file.suffixes) if s not in (".gz", ".zst")), "").removeprefix(".")
    if ending not in ("jsonl", "json", "csv", "tsv", "parquet", "txt"):
        raise UserError(
            f"{file.name}: format cannot be told from the ending {ending!r}; set format: jsonl, csv, ... on the source"
        )
    return ending


def _open_text(file: Path, errors: str = "strict") -> io.TextIOWrapper:
    codec = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix)
    return io.TextIOWrapper(pa.input_stream(str(file), compression=codec), encoding="utf-8", errors=errors, newline="")


def _line_rows(file: Path, lines: io.TextIOWrapper, kind: str, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        where = f"{file.name}:{number}"
        if not line.strip():
            continue
        if foreign := _foreign_byte(line):
            yield where, UserError(f"{where}: not UTF-8 text (byte {foreign})")
            continue
        if kind == "txt":
            yield where, {text: line}
            continue
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            yield where, UserError(f"{where}: {_json_error(error)}")


def _json_error(error: json.JSONDecodeError) -> str:
    return f"not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})"


def _foreign_byte(text: str) -> str | None:
    """The first byte that is no UTF-8, as `surrogateescape` keeps it; None in text that is whole."""
    return next((f"0x{ord(c) - 0xDC00:02x}" for c in text if "\udc80" <= c <= "\udcff"), None)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """A file that is no text, or a damaged archive, is named with what is wrong with it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:  # pyarrow's, of an archive that is cut short or is none; disks and permissions have errno
        if error.errno is not None:
            raise
        raise UserError(f"{file.name}: cannot be unpacked ({error}); copy or download it again") from None


def _csv_rows(file: Path, reader: csv.DictReader[str], skipped_lines: int) -> Iterator[tuple[str, Any]]:
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield (
                where := f"{file.name}:{reader.reader.line_num + skipped_lines}",
                UserError(f"{where}: not valid {file.suffix[1:]} ({error})"),
            )
            continue
        where = f"{file.name}:{reader.line_num + skipped_lines}"
        if foreign := _foreign_byte("".join(str(value) for value in row.values())):
            yield where, UserError(f"{where}: not UTF-8 text (byte {foreign})")
            continue
        if None in row or None in row.values():
            yield (
                where,
                UserError(f"{where}: the row has not as many fields as the header ({len(reader.fieldnames or [])})"),
            )
        else:
            yield where, row


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"{file.name}: not a readable parquet file ({error})") from None


def _json_rows(file: Path, kind: str) -> Iterator[tuple[str, Any]]:
    try:
        with _readable(file), _open_text(file) as stream:
            value = json.load(stream)
    except json.JSONDecodeError as error:
        raise UserError(f"{file.name}:{error.lineno}: {_json_error(error)}") from None
    if not isinstance(value, (dict, list)):
        raise UserError(f"{file.name}: holds a JSON {type(value).__name__}, not a list or mapping of rows")
    if kind == "chitchat":
        if isinstance(value, list):
            raise UserError(f"{file.name}: a chitchat data set maps ids to conversations, this is a list")
        for key, conversation in value.items():
            yield f"{file.name}:{key}", _chitchat_turns(conversation)
        return
    for index, row in enumerate(value.values() if isinstance(value, dict) else value):
        yield f"{file.name}:{index + 1}", row


def _chitchat_turns(conversation: dict[str, Any]) -> tuple[Turn, ...] | UserError:
    """Both participants are human, so every turn is a user's; consecutive messages of one sender are one turn."""
    turns = ("\n".join(message["text"].strip() for message in group).strip() for group in conversation["messages"])
    found = tuple(Turn(USER, text) for text in turns if text)
    return found or UserError("chitchat: a conversation without words")
