"""Corpora in, documents out.

Reads jsonl, json, csv, tsv, parquet, txt (also .gz and .zst) and the chitchat data set, from wherever
`corpus_files.resolve` finds them. Files are streamed. A row becomes a document: a conversation, its label, and an id
that is the hash of its content, so that splits, subsets and joins depend neither on order nor on position.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from fac_jax.config.data import DataSet, Source
from fac_jax.corpus_files import CorpusFile, fingerprints, resolve
from fac_jax.errors import UserError, first_line
from fac_jax.plain import digest, suggest
from fac_jax.words import is_text, words

T = TypeVar("T")
log = logging.getLogger(__name__)
USER, ASSISTANT = "user", "assistant"
COUNTED_BYTES = 2**28
"""Corpora up to this size are read once to count their documents: a few seconds."""
POSITIVE_ABOVE = 0.5
"""A label above this is positive."""
BLOCK_BYTES = 2**23
"""Bytes of a file in memory at once, and in one request to a server."""
FIELD_CHARACTERS = 2**28
"""Of a field of csv; a file whose quotes are wrong may be one field to its end."""


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


def document_hash(document_id: str, salt: str) -> float:
    """Uniform in [0, 1), fixed by the document's content and `salt`; splits made with it do not depend on order."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{document_id}".encode()).digest()[:8], "big") / 2**64


def make_document(turns: Iterable[Turn], label: float | None, source: str) -> Document:
    """A document whose id is the hash of its turns."""
    turns = tuple(turns)
    content = json.dumps([(turn.role, turn.content) for turn in turns], ensure_ascii=False)
    return Document(hashlib.sha256(content.encode()).hexdigest()[:16], turns, label, source)


def read_documents(
    dataset: DataSet,
    name: str,
    skipped: list[str] | None = None,
    check: Callable[[Document], object] | None = None,
) -> Iterator[Document]:
    """Documents of a data set in file order, each content once (unless `unique` is false).

    A malformed row raises UserError with its file and row, or with `on_bad_row: skip` is logged, appended to `skipped`
    and left out; so is a document of the data set that `check` raises UserError for. What is in `without`, word for
    word, is left out and counted in the log. Raises UserError when nothing is left.
    """
    skipped = [] if skipped is None else skipped
    seen: set[str] = set()
    apart: set[str] = set()
    if dataset.without:
        other = replace(dataset, sources=dataset.without, without=(), sample=1.0, unique=True)
        apart = {words(document.text) for document in read_documents(other, f"{name}.without", skipped)}
    found, rows, left_out, skipped_before = False, 0, 0, len(skipped)
    for source in dataset.sources:
        taken = 0
        parse = partial(_row_document, source=source)
        for document in parsed_rows(source, dataset.on_bad_row, skipped, parse):
            rows += 1
            if source.limit is not None and taken >= source.limit:
                break
            low, high = source.split
            if not low <= document_hash(document.id, "split") < high:
                continue
            if document_hash(document.id, "sample") >= dataset.sample or document.id in seen:
                continue
            if apart and words(document.text) in apart:
                left_out += 1
                continue
            if dataset.unique:
                seen.add(document.id)
            try:
                if check is not None:
                    check(document)
            except UserError as error:
                _leave_out(error, dataset.on_bad_row, skipped)
                continue
            found = True
            taken += 1
            yield document
    if left_out:
        log.info("data.%s: %d documents left out, which data.%s.without holds", name, left_out, name)
    if not found:
        raise UserError(f"data.{name} has no documents: {_why_none(dataset, rows, skipped[skipped_before:])}")


def _why_none(dataset: DataSet, rows: int, malformed: Sequence[str]) -> str:
    paths = ", ".join(source.path for source in dataset.sources)
    if not paths:
        return "it lists no sources"
    if rows:
        return f"{paths} gave nothing under its split, sample ({dataset.sample}) and limit; widen them or mend the path"
    if malformed:
        return f"every row of {paths} is malformed ({len(malformed):,}); the first is {malformed[0]}"
    return f"{paths} is empty: no row is in it; mend the path"


def read_rows(source: Source) -> Iterator[tuple[str, Any]]:
    """Raw rows of a source's files with all of their fields, each with its place. Raises UserError for one that cannot
    be read."""
    for file in resolve(source.path):
        for where, row in _read_rows(file, source, every_field=True):
            if isinstance(row, UserError):
                raise row
            yield where, row


def parsed_rows(
    source: Source, on_bad_row: str, skipped: list[str], parse: Callable[[Any, str], T], every_field: bool = False
) -> Iterator[T]:
    """What `parse(row, place)` makes of the rows of every file; of parquet it sees the fields that the source names, or
    every field. A row that is a UserError stops the run or, with `skip`, is logged, appended to `skipped` and left out;
    a file that cannot be read to its end always stops the run."""
    for file in resolve(source.path):
        for where, row in _read_rows(file, source, every_field):
            try:
                if isinstance(row, UserError):
                    raise row
                parsed = parse(row, where)
            except UserError as error:
                _leave_out(error, on_bad_row, skipped)
            else:
                yield parsed


def file_fingerprints(dataset: DataSet) -> dict[str, list[str]]:
    """Of the files of a data set, those of `without` among them, by the path that names them, in order."""
    paths = {source.path for source in (*dataset.sources, *dataset.without)}
    return {path: fingerprints(path) for path in sorted(paths)}


def files_digest(dataset: DataSet) -> str:
    """Stands for what the files of a data set hold: elsewhere, or later, other files may lie at the same paths."""
    return digest(list(file_fingerprints(dataset).values()))


def is_quickly_read(dataset: DataSet) -> bool:
    """Whether a data set may be read once more, just to know more of it: that would neither take long nor log every
    malformed row twice."""
    size = sum(file.size for source in dataset.sources for file in resolve(source.path))
    return dataset.on_bad_row == "stop" and size <= COUNTED_BYTES


def count_documents(dataset: DataSet, name: str) -> int | None:
    """How many `read_documents` gives, for an ETA; None where it is not quickly read."""
    return sum(1 for _ in read_documents(dataset, name)) if is_quickly_read(dataset) else None


def _leave_out(error: UserError, on_bad_row: str, skipped: list[str]) -> None:
    """A malformed row stops the run, or is logged, and noted in `skipped`."""
    if on_bad_row == "stop":
        raise UserError(
            f"{error}; mend the row, or pass --on-bad-row skip to count, list and leave out such rows"
        ) from None
    skipped.append(str(error))
    log.warning("left out: %s", error)


def _row_document(row: Any, where: str, source: Source) -> Document:
    if isinstance(row, tuple):  # turns made by a format of its own
        return make_document(row, source.constant_label, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object with fields, this one is {type(row).__name__}")
    turns = _turns(_field(row, source.text, "text", where), where)
    label = source.constant_label if source.label is None else _label(row, source.label, where)
    return make_document(turns, label, where)


def _field(row: dict[str, Any], name: str, setting: str, where: str) -> Any:
    if name not in row:
        raise UserError(
            f"{where}: no field {name!r}{suggest(name, row)}; it has {', '.join(map(str, row))}; where another holds "
            f"the {setting}, name it on the source ({setting}: FIELD)"
        )
    return row[name]


def _turns(value: Any, where: str) -> tuple[Turn, ...]:
    if isinstance(value, str):
        value = [{"role": USER, "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: the text is {value!r}; it must be text or a list of {{role, content}} messages")
    turns: list[Turn] = []
    after_empty = False
    for message in value:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{where}: a message must have a role and a content, this one is {str(message)[:80]!r}")
        content = content.strip()
        if content:
            if after_empty and turns and turns[-1].role == role:  # templates refuse two turns of one role
                content = f"{turns.pop().content}\n\n{content}"
            turns.append(Turn(role, content))
        after_empty = not content
    if not all(is_text(turn.content) for turn in turns):
        raise UserError(f"{where}: the text holds half of a UTF-16 pair, which is no character")
    if not any(turn.role == USER for turn in turns):
        raise UserError(f"{where}: the text is empty, or no turn is a user's")
    return tuple(turns)


def _label(row: dict[str, Any], name: str, where: str) -> float:
    value = _field(row, name, "label", where)
    if isinstance(value, str):
        value = {"true": 1.0, "false": 0.0}.get(value.strip().lower(), value)
    try:
        label = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: the label {name!r} is {value!r}; it must be a number or true/false") from None
    if not math.isfinite(label):
        raise UserError(f"{where}: the label {name!r} is {value!r}; it must be finite")
    return label


def _read_rows(file: CorpusFile, source: Source, every_field: bool) -> Iterator[tuple[str, Any]]:
    """Rows of a file, each with its place; a row that cannot be parsed comes as the UserError that says so."""
    kind = _format(file, source)
    if kind == "parquet":
        for index, row in enumerate(_parquet_rows(file, source, every_field)):
            yield f"{file.name}:{index + 1}", row
    elif kind in ("json", "chitchat"):
        yield from _json_rows(file, kind)
    else:
        with _readable(file), _open_text(file, "surrogateescape") as lines:
            for _ in range(source.skip_lines):
                lines.readline()
            if kind in ("csv", "tsv"):
                yield from _csv_rows(file, lines, kind, source.skip_lines)
            else:
                yield from _line_rows(file, lines, kind, source.text)


def _format(file: CorpusFile, source: Source) -> str:
    if source.format != "auto":
        return source.format
    suffixes = PurePosixPath(file.name).suffixes
    ending = next((s for s in reversed(suffixes) if s not in (".gz", ".zst")), "").removeprefix(".")
    if ending not in ("jsonl", "json", "csv", "tsv", "parquet", "txt"):
        raise UserError(
            f"{file.name}: format cannot be told from the ending {ending!r}; set format: jsonl, csv, ... on the source"
        )
    return ending


@contextmanager
def _open_text(file: CorpusFile, errors: str = "strict") -> Iterator[io.TextIOWrapper]:
    """Its text, without a byte order mark and with line ends as they are."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(PurePosixPath(file.name).suffix)
    with file.open() as stored, pa.BufferedInputStream(stored, min(BLOCK_BYTES, max(file.size, 1))) as buffered:
        content = pa.CompressedInputStream(buffered, codec) if codec else buffered
        with io.TextIOWrapper(content, encoding="utf-8-sig", errors=errors, newline="") as text:
            yield text


def _line_rows(file: CorpusFile, lines: io.TextIOWrapper, kind: str, text: str) -> Iterator[tuple[str, Any]]:
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
    if is_text(text):  # a thousand times faster than to look at each character
        return None
    return next((f"0x{ord(c) - 0xDC00:02x}" for c in text if "\udc80" <= c <= "\udcff"), None)


@contextmanager
def _readable(file: CorpusFile) -> Iterator[None]:
    """A file that is no text, or a damaged archive, is named with what is wrong with it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:  # pyarrow's, of an archive that is cut short or is none; disks and permissions have errno
        if error.errno is not None:
            raise
        raise UserError(f"{file.name}: cannot be unpacked ({error}); copy or download it again") from None


def _csv_rows(file: CorpusFile, lines: io.TextIOWrapper, kind: str, skipped_lines: int) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(FIELD_CHARACTERS)
    reader = csv.DictReader(lines, delimiter="," if kind == "csv" else "\t", strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{file.name}:{reader.reader.line_num + skipped_lines}: not valid {kind} ({error}): where the next row "
                'begins is not known, so the file must be mended; a quote inside a quoted field is written twice ("")'
            ) from None
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


def _parquet_rows(file: CorpusFile, source: Source, every_field: bool) -> Iterator[dict[str, Any]]:
    """Rows with the fields that the source names; with all of them where one is missing, which is then said."""
    try:
        # pre_buffer, pyarrow's default, would hold the columns of the whole file in memory before the first row.
        with file.open() as stored, pq.ParquetFile(stored, buffer_size=BLOCK_BYTES, pre_buffer=False) as table:
            wanted = [source.text] if source.label is None else [source.text, source.label]
            some = not every_field and set(wanted) <= set(table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=1024, columns=wanted if some else None):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"{file.name}: not a readable parquet file ({first_line(error)})") from None


def _json_rows(file: CorpusFile, kind: str) -> Iterator[tuple[str, Any]]:
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
            where = f"{file.name}:{key}"
            yield where, _chitchat_turns(conversation, where)
        return
    for index, row in enumerate(value.values() if isinstance(value, dict) else value):
        yield f"{file.name}:{index + 1}", row


def _chitchat_turns(conversation: Any, where: str) -> tuple[Turn, ...] | UserError:
    """Both participants are human, so every turn is a user's; consecutive messages of one sender are one turn."""
    try:
        turns = ["\n".join(message["text"].strip() for message in group).strip() for group in conversation["messages"]]
    except (AttributeError, KeyError, TypeError):
        return UserError(
            f"{where}: a chitchat conversation needs the form {{messages: [[{{text: ...}}, ...], ...]}}, a list "
            "for each turn; for other files set format to json"
        )
    found = tuple(Turn(USER, text) for text in turns if text)
    return found or UserError(f"{where}: a conversation without words")
