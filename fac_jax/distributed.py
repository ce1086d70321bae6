"""Several processes as one run: how they find each other, and how all of them end when one does.

JAX's multi-controller runtime does the work: every process runs the same command and computes its devices' part. What
it leaves open is the end. A process that throws would wait minutes for the others at exit, one that hangs would never
be noticed, and SIGTERM would be swallowed. So here a process that fails says why on its last line and leaves at once
with a status that a launcher understands; a watchdog ends one in which nothing moves; and SIGTERM becomes a step, the
same one in every process, at which a training saves and ends.

A process that is alone (`mesh.coordinator` is not set) has no watchdog and ends as any program does.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import numpy as np

from fac_jax.config.file import Config
from fac_jax.config.machine import MeshConfig
from fac_jax.errors import UserError, first_line
from fac_jax.plain import digest

CRASHED, HUNG, STOPPED = 70, 71, 143
"""Exit statuses: an exception; nothing moved, here or in a peer; SIGTERM, after saving. After them and after a kill the
same command goes on, while status 1 means that somebody has to mend something first."""
HEARTBEAT_S = 10
"""A process whose heartbeat fails for so long is dead to the others; JAX's default is 100 s. Measured with two
processes on one machine and a `step_timeout_s` of 8 (tests/test_distributed.py, 2026-11-24): both have ended 0.4 s
after one throws, 8 s after one hangs or is killed, and 11 s after one is stopped by SIGSTOP."""
START_S = 3600.0
"""Seconds between the start and the first step: a harvest of hours calls `beat` itself."""
SLOWER = 10
"""A step may take this many times as long as the slowest one before it."""


class Process:
    """Which process this is; alone until `start` has found others."""

    index, count = 0, 1
    watchdog: Watchdog | None = None


def start(config: MeshConfig) -> None:
    """Join the other processes that `config` names, if it names any; before anything touches a device.

    Raises UserError when JAX does not know where they are; where they do not come within `mesh.start_timeout_s`, the
    watchdog ends this one.
    """
    if config.coordinator is None:
        return
    import jax

    known = None if config.coordinator == "auto" else config.coordinator
    sys.excepthook = _crash
    threading.excepthook = lambda found: _crash(found.exc_type, found.exc_value, found.exc_traceback)
    Process.index, Process.count = config.process_id or 0, config.processes or 1
    Process.watchdog = Watchdog(config.step_timeout_s)
    beat("calling for all processes (mesh.start_timeout_s)", config.start_timeout_s)
    try:
        jax.distributed.initialize(
            *(known, config.processes, config.process_id),
            initialization_timeout=config.start_timeout_s + 60,  # JAX would end with a stack and no reason
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=60,
        )
    except ValueError as error:
        raise UserError(
            f"mesh.coordinator {config.coordinator}: JAX does not know the processes ({first_line(error)}): give all "
            "of them HOST:PORT of process 0 and --mesh.processes, and each its own --mesh.process-id; auto works where "
            "JAX knows the cluster (SLURM, Open MPI, Cloud TPU)"
        ) from None
    Process.index, Process.count = jax.process_index(), jax.process_count()
    beat("the start", START_S)


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return Process.index == 0


def wait_for_all(moment: str) -> None:
    """Return when every process has come to this moment."""
    if Process.count > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(moment)


def from_first(value: bool) -> bool:
    """What the first process passed, in all of them: for decisions that its view of the files makes."""
    if Process.count == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def from_all(mine: np.ndarray) -> np.ndarray:
    """What every process passed, [processes, ...]. Sent as bytes, because JAX makes 32-bit numbers of 64-bit ones."""
    if Process.count == 1:
        return mine[None]
    from jax.experimental import multihost_utils

    found = multihost_utils.process_allgather(np.frombuffer(mine.tobytes(), np.uint8))
    return np.asarray(found).view(mine.dtype).reshape(Process.count, *mine.shape)


def check_same(config: Config) -> None:
    """Raise UserError in every process whose settings are not those of the first."""
    if Process.count == 1:
        return
    from dataclasses import replace

    same_for_all = replace(config, mesh=replace(config.mesh, process_id=0))
    found = from_all(np.frombuffer(bytes.fromhex(digest(same_for_all)), np.uint8))
    others = [index for index in range(Process.count) if (found[index] != found[0]).any()]
    if others:
        raise UserError(
            f"processes {', '.join(map(str, others))} were started with other settings than process 0: "
            "only --mesh.process-id may differ"
        )


def beat(doing: str, limit_s: float | None = None) -> None:
    """Say that something moved, and what comes next, which may take `limit_s` (by default `mesh.step_timeout_s`)."""
    if Process.watchdog is not None:
        Process.watchdog.beat(doing, limit_s)


def leave(status: int) -> int:
    """`status`; with several processes a failed one does not return, as the interpreter's end would wait for all."""
    if status != 0 and Process.count > 1:
        _exit(status)
    return status


class Watchdog:
    """A thread that ends the process when `beat` is not called in time."""

    def __init__(self, step_timeout_s: float) -> None:
        self._least_s, self._slowest_s = step_timeout_s, 0.0
        self._doing, self._limit_s, self._since, self._is_step = "", 3600.0, time.monotonic(), False
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str, limit_s: float | None) -> None:
        """What `distributed.beat` says."""
        now = time.monotonic()
        if self._is_step:
            self._slowest_s = max(self._slowest_s, now - self._since)
        self._is_step = limit_s is None
        limit_s = max(self._least_s, SLOWER * self._slowest_s) if limit_s is None else limit_s
        self._doing, self._limit_s, self._since = doing, limit_s, now

    def _watch(self) -> None:
        while True:
            time.sleep(0.5)
            waited_s = time.monotonic() - self._since
            if waited_s > self._limit_s:
                faulthandler.dump_traceback(sys.stderr)
                _say(
                    f"nothing moved for {waited_s:.0f} s (limit {self._limit_s:.0f} s) after {self._doing}: this "
                    "process or a peer hangs; the same command goes on from the last checkpoint"
                )
                _exit(HUNG)


class StopRequest:
    """Whether SIGTERM asks the run to end; `at(step)` says so at one step, the same in every process."""

    def __init__(self) -> None:
        self.signalled = False

    def at(self, step: int) -> bool:
        """Call it with every step, in order."""
        if Process.count == 1:
            return self.signalled
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


@contextmanager
def heeding_sigterm() -> Iterator[StopRequest]:
    """While it lasts, SIGTERM only makes a request; with several processes JAX's preemption service listens anyway."""
    request = StopRequest()
    if Process.count > 1 or threading.current_thread() is not threading.main_thread():
        yield request
        return

    def heed(number: int, frame: object) -> None:
        request.signalled = True

    before = signal.signal(signal.SIGTERM, heed)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)


def _crash(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    traceback.print_exception(kind, error, trace)
    _say(f"{kind.__name__}: {first_line(error) if isinstance(error, Exception) else error}")
    _exit(CRASHED)


def _say(reason: str) -> None:
    print(f"process {Process.index} of {Process.count}: {reason}", file=sys.stderr)


def _exit(status: int) -> None:
    """At once: neither JAX's barrier at exit nor a thread that hangs is waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
