"""Answers that were paid for, kept on this machine: asked again, by this run or any other, they cost nothing.

One SQLite file in the user's cache folder, in WAL mode, shared by all runs; a row is written the moment its answer
arrives, and survives a kill. A key is the digest of everything that can change the answer: the server's URL, the model
as the server reports it, the body as it is sent (system prompt, messages, schema, sampling parameters, seed) and which
of several equal requests it is. What is no answer to build on is not kept: errors, texts that were cut or filtered, and
those that do not follow their schema (`llm/http.py` decides).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sqlite3
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fac_jax.errors import UserError
from fac_jax.llm.client import Reply

FOLDER_VARIABLE = "FAC_JAX_CACHE"
BUSY_S = 60.0
"""Seconds to wait for another run's write; one takes well below a millisecond."""
AT_ONCE = 500  # keys in one query: SQLite takes 999 by default
FIELDS = [field.name for field in dataclasses.fields(Reply)]
SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS servers (
    url TEXT, model TEXT, identity TEXT NOT NULL, PRIMARY KEY (url, model)
) WITHOUT ROWID;
"""


def cache_folder() -> Path:
    """Where things are kept between runs: $FAC_JAX_CACHE, or fac_jax in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get(FOLDER_VARIABLE)
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fac_jax"


def keys(identity: dict[str, Any], bodies: Sequence[bytes]) -> list[str]:
    """A key for each request of one call, in order. The second of two equal requests asks for another sample."""
    server = json.dumps(identity, sort_keys=True).encode()
    seen: Counter[bytes] = Counter()
    found = []
    for body in bodies:
        found.append(hashlib.sha256(b"%s\n%d\n%s" % (server, seen[body], body)).hexdigest())
        seen[body] += 1
    return found


class Cache:
    """The file, open. Raises UserError when it cannot be opened, read or written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error.strerror or str(error)) from None
        with self._named():
            self._file = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            weakref.finalize(self, self._file.close)  # what was put is there already: nobody has to remember it
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")  # a kill loses nothing, a power cut the last rows
            self._file.executescript(SCHEMA)
        os.chmod(path, 0o600)  # prompts and answers are the user's

    def get(self, wanted: Sequence[str]) -> dict[str, Reply]:
        """Those of the wanted keys that are there."""
        found: dict[str, Reply] = {}
        with self._named():
            for first in range(0, len(wanted), AT_ONCE):
                part = wanted[first : first + AT_ONCE]
                query = f"SELECT key, reply FROM replies WHERE key IN ({','.join('?' * len(part))})"
                found.update((key, Reply(*json.loads(reply))) for key, reply in self._file.execute(query, part))
        return found

    def put(self, key: str, reply: Reply) -> None:
        """Keep an answer; the first one for a key stays, so that what a product was made from does not change."""
        row = (key, json.dumps([getattr(reply, name) for name in FIELDS]))  # asdict copies deeply: 60 us
        with self._named():
            self._file.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", row)

    def remember(self, url: str, model: str, identity: dict[str, Any]) -> None:
        """Note what a server said of itself, for a dry run, which asks it nothing."""
        with self._named():
            row = (url, model, json.dumps(identity, sort_keys=True))
            self._file.execute("INSERT OR REPLACE INTO servers VALUES (?, ?, ?)", row)

    def last_identity(self, url: str, model: str | None) -> dict[str, Any] | None:
        """What the server at `url` said of itself last; of any of its models when `model` is None."""
        with self._named():
            query = "SELECT identity FROM servers WHERE url = ? AND (model = ? OR ? IS NULL)"
            row = self._file.execute(query, (url, model, model)).fetchone()
        return None if row is None else json.loads(row[0])

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise self._unusable(str(error)) from None

    def _unusable(self, why: str) -> UserError:
        return UserError(
            f"the cache of answers {self.path} cannot be used ({why}): set {FOLDER_VARIABLE} to another folder, delete "
            "the file (its answers are then paid for again), or say --llm.no-cache"
        )


def open_cache() -> Cache:
    """The user's."""
    return Cache(cache_folder() / "replies.sqlite")
