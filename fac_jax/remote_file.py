"""A file on a server, read in ranges: every byte, all of one version, or an error in bounded time.

What a broken connection leaves must never look like the end of a file, so the size is known before anything is read and
a range that comes short is a failure. Failures that may pass are tried again for a while; the others, and those that
last, are one line that says what to do.
"""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fac_jax.errors import UserError, first_line

T = TypeVar("T")

CONTACT_S = 10.0
"""Seconds for a server to answer at all, tries included: a wrong address is said at once, and is no hang."""
READ_S = 60.0
"""Seconds for one range of a file that is being read: a run of days outlives a short disturbance."""
DENIED = re.compile(
    "ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|PERMISSION_DENIED|UNAUTHENTICATED|HTTP status 40[13]|40[13] Client"
    "|(Gated|Disabled|)RepoError|(RepositoryNotFound|RevisionNotFound|HFValidation)Error"
)
LASTING = re.compile(f"{DENIED.pattern}|NO_SUCH|NOT_FOUND|INVALID|HTTP status 40[04]|40[04] Client")
"""Trying again does not help."""
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) to those of somebody who may read it",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the key file of somebody who may read it, or run "
    "`gcloud auth application-default login`; a public bucket needs only CLOUDSDK_AUTH_DISABLE_CREDENTIALS=true",
    "hf": "check the name, accept its licence on the hub if it is gated, and set HF_TOKEN",
}


class Changed(Exception):
    """The file is not the one that was opened."""


class RemoteFile(io.RawIOBase):
    """Bytes of `url`, of which there are `size`.

    `read_at(start, count)` fetches them; `check()` raises Changed or FileNotFoundError if the file is another by now.
    """

    def __init__(self, url: str, size: int, read_at: Callable[[int, int], bytes], check: Callable[[], None]) -> None:
        self._url, self._size, self._read_at, self._check = url, size, read_at, check
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        if count:
            buffer[:count] = self._range(self._position, count)
            self._position += count
        return count

    def _range(self, start: int, count: int) -> bytes:
        try:
            return patiently(lambda: self._whole_range(start, count), READ_S)
        except (Changed, FileNotFoundError):
            raise UserError(
                f"{self._url} changed or was deleted while it was read (at byte {start:,} of {self._size:,}); leave it "
                "as it is, then run the same command again"
            ) from None
        except OSError as error:
            raise refused(f"{self._url}, at byte {start:,} of {self._size:,},", error) from None

    def _whole_range(self, start: int, count: int) -> bytes:
        try:
            found = self._read_at(start, count)
        except OSError:
            self._check()  # of a file that is gone some servers say only that something failed
            raise
        self._check()  # after the bytes came: they are of the version that was opened, or are not handed out
        if len(found) != count:
            raise ConnectionError(f"{len(found):,} bytes came instead of {count:,}")
        return found


def patiently(call: Callable[[], T], seconds: float) -> T:
    """`call()`, tried again with growing pauses while its OSError may pass; raises the last one after `seconds`."""
    until, pause = time.monotonic() + seconds, 0.5
    said: OSError | None = None
    while True:
        try:
            return _within(until - time.monotonic(), call)
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            # That the time is over says less than what the server said before.
            said = said if said and isinstance(error, TimeoutError) else error
            if LASTING.search(str(error)) or time.monotonic() + pause > until:
                raise said from None
        time.sleep(pause)
        pause = min(2 * pause, 8.0)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """`call()`, or TimeoutError. It runs in a thread that is left behind then: Google's client has no timeout that can
    be set for a server that accepts connections and never answers, and cannot be interrupted."""
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, call()))
        except BaseException as error:  # it belongs to whoever waits
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(seconds, 0.0))
    if not outcome:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    well, found = outcome[0]
    if not well:
        raise found
    return found


def refused(what: str, error: Exception) -> UserError:
    """What a server's failure means: `what` begins with the URL."""
    said = re.split(r" error_info=| \(Request ID:| Details:|; Details", first_line(error))[0]
    said = said.partition("last message of ")[2] or said
    if DENIED.search(str(error)) or "OAuth2" in str(error):  # that no token came may pass
        return UserError(f"{what} cannot be read ({said}): {CREDENTIALS[what.partition('://')[0]]}")
    return UserError(
        f"{what} cannot be read ({said}): check the network and the address of the server, then run the same command "
        "again"
    )
