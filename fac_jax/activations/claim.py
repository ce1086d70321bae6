"""One process at a time is a store's writer of a given name: the second stops with a clear error.

In a local folder (or one that machines share by a network file system with locks) this is a file lock, which ends with
its process. In an object store it is a lease: a small object that the writer renews by conditional writes. A second
writer watches it for `LEASE_S` seconds; if it is renewed meanwhile, somebody is alive. A writer that was suspended so
long that its lease was taken over finds out before its next commit.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

from fac_jax.activations.arrays import Root, storage
from fac_jax.errors import UserError

LEASE_S = 20.0
RENEW_S = 4.0
RELEASED = b"{}"  # not nothing: some servers take no empty object
REMEDY = "wait for it or stop it; two writers need two names, which several processes of one run get by themselves"


class Claim(Protocol):
    """The right to write under one name."""

    def check(self) -> None:
        """Raise UserError if the right was lost."""

    def release(self) -> None:
        """Give it up."""


def claim(root: Root, writer: str) -> Claim:
    """Become `writer`. Raises UserError when another process is."""
    return _Lock(root.folder, writer) if root.folder is not None else _Lease(root, writer)


def _me() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _held(lease: Any) -> bool:
    return lease.state != "missing" and lease.value != RELEASED


class _Lock:
    def __init__(self, folder: Path, writer: str) -> None:
        path = folder / "claims" / f"{writer}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); choose another folder") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._file, 4096).decode(errors="replace") or "another process"
            os.close(self._file)
            raise UserError(f"writer {writer} of the store at {folder} is {owner} already: {REMEDY}") from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, _me().encode(), 0)

    def check(self) -> None:
        """A lock is held as long as its process lives."""

    def release(self) -> None:
        os.ftruncate(self._file, 0)
        os.close(self._file)


class _Lease:
    def __init__(self, root: Root, writer: str) -> None:
        self._root, self._writer, self._key = root, writer, f"claims/{writer}.json"
        self._value = json.dumps({"owner": _me(), "token": uuid.uuid4().hex, "renewals": 0}).encode()
        self._lost: str | None = None
        self._ended, self._renewing = threading.Event(), threading.Lock()
        there = self._read()
        if _held(there):
            self._watch(there)
            there = self._read()
        if not self._write(there.stamp.generation, self._value):
            raise UserError(f"writer {writer} of the store at {root.url} was claimed by another process now: {REMEDY}")
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._keep, name=f"lease-{writer}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        if time.monotonic() - self._renewed > LEASE_S / 2:  # this process was suspended, or the server does not answer
            self._renew()
        if self._lost is not None:
            raise UserError(
                f"writer {self._writer} of the store at {self._root.url} {self._lost}: this process stops, and the "
                "other goes on after the last commit"
            )

    def release(self) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        there = self._read()
        if self._lost is None and there.value == self._value:
            self._write(there.stamp.generation, RELEASED)

    def _watch(self, first: Any) -> None:
        """Raise UserError if the lease is renewed while we look."""
        until = time.monotonic() + LEASE_S
        while time.monotonic() < until:
            time.sleep(min(RENEW_S / 4, max(0.0, until - time.monotonic())))
            now = self._read()
            if not _held(now):
                return
            if now.value != first.value:
                owner = json.loads(now.value).get("owner", "another process")
                raise UserError(f"writer {self._writer} of the store at {self._root.url} is {owner} already: {REMEDY}")

    def _keep(self) -> None:
        while self._lost is None and not self._ended.wait(RENEW_S):
            self._renew()

    def _renew(self) -> None:
        """Write the lease anew, unless it is somebody else's by now."""
        with self._renewing:
            try:
                there = self._read()
                value = json.dumps({**json.loads(self._value), "renewals": time.time_ns()}).encode()
                # Compared by content too: not every object store heeds the condition of a write.
                if there.value != self._value or not self._write(there.stamp.generation, value):
                    self._lost = "was taken over by another process"
                else:
                    self._value, self._renewed = value, time.monotonic()
            except UserError as error:  # an outage: the lease lives on for a while
                if time.monotonic() - self._renewed > LEASE_S:
                    self._lost = f"could not be renewed for {LEASE_S:g} s ({error})"

    def _read(self) -> Any:
        with storage(f"{self._root.url}/{self._key}"):
            return self._root.kv.read(self._key).result()

    def _write(self, expected: bytes, value: bytes) -> bool:
        """Whether the lease was what was expected, and is now `value`."""
        with storage(f"{self._root.url}/{self._key}"):
            return bool(self._root.kv.write(self._key, value, if_equal=expected).result().generation)
