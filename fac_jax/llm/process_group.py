"""A server's processes, told apart from others that carry the same number later, and ended all together.

Reads /proc (Linux). A process is known by its id and its start (boot and clock tick): an id is given again, a start is
not. A process started in a session of its own leads a group that its children belong to, and that `end` ends.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fac_jax.errors import UserError

PROC = Path("/proc")
KILL_S = 10.0
"""Seconds for a killed process to be gone; one that waits for a disk or a driver can take some."""


@dataclass(frozen=True)
class Leader:
    """The first process of a group."""

    pid: int
    boot: str
    """Which start of the machine it belongs to; ticks begin again with the next one."""
    tick: int
    """When it started, in clock ticks since then."""


@dataclass(frozen=True)
class Ended:
    """What became of a group."""

    processes: int
    """How many there were."""
    killed: int
    """How many of them had not ended within the grace period."""
    seconds: float
    """From the first signal to the end of the last."""


def leader(pid: int) -> Leader:
    """The process `pid`, which must be there."""
    found = _read(pid)
    if found is None:
        raise ProcessLookupError(f"no process {pid}")
    return Leader(pid, _boot(), found.tick)


def alive(who: Leader) -> bool:
    """Whether that very process is still there and no zombie."""
    found = _read(who.pid)
    return found is not None and not found.dead and (_boot(), found.tick) == (who.boot, who.tick)


def members(who: Leader) -> list[int]:
    """Ids of the group's processes that live, those that outlived their leader too."""
    if _boot() != who.boot:
        return []
    now = _read(who.pid)
    if now is not None and now.tick != who.tick:
        return []  # the number went to another process, and with it the group's
    found = [process for pid in _pids() if (process := _read(pid)) is not None]
    return sorted(
        process.pid
        for process in found
        if process.group == process.session == who.pid and process.tick >= who.tick and not process.dead
    )


def memory_bytes(who: Leader) -> int:
    """Memory of the group's processes, pages that they share counted once."""
    total = 0
    for pid in members(who):
        try:
            text = (PROC / str(pid) / "smaps_rollup").read_text(encoding="utf-8")
            total += sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
        except (OSError, ProcessLookupError):  # it ended meanwhile
            continue
    return total


def end(who: Leader, grace_s: float) -> Ended:
    """SIGTERM to the whole group, and SIGKILL to what has not ended after `grace_s` seconds.

    Raises UserError when a process outlives even that. A group that is not there is left alone.
    """
    began = time.monotonic()
    there = members(who)
    left = there
    if there:
        _signal(who, signal.SIGTERM)
        left = _wait_until_gone(who, grace_s)
    killed = left
    if left:
        _signal(who, signal.SIGKILL)
        left = _wait_until_gone(who, KILL_S)
    if left:
        raise UserError(
            f"processes {left} did not end {KILL_S:.0f} s after SIGKILL (they may wait for a driver or a disk); look "
            "at them with ps"
        )
    return Ended(len(there), len(killed), time.monotonic() - began)


def require_linux() -> None:
    """Raise UserError where there is no /proc to tell processes apart by."""
    if not (PROC / "self/stat").exists():
        raise UserError(
            f"the sidecar needs Linux (/proc), and this is {sys.platform}; start a server yourself and name it with "
            "--llm.url"
        )


def _signal(who: Leader, what: signal.Signals) -> None:
    try:
        os.killpg(who.pid, what)
    except ProcessLookupError:
        pass  # the last one ended meanwhile


def _wait_until_gone(who: Leader, seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while (left := members(who)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@dataclass(frozen=True)
class _Process:
    pid: int
    state: str
    group: int
    session: int
    tick: int

    @property
    def dead(self) -> bool:
        return self.state in "ZX"


def _pids() -> list[int]:
    return [int(name) for name in os.listdir(PROC) if name.isdecimal()]


def _read(pid: int) -> _Process | None:
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses, which may itself hold spaces and parentheses.
    state, _, group, session, *rest = text[text.rindex(")") + 2 :].split()
    return _Process(pid, state, int(group), int(session), int(rest[15]))


def _boot() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
