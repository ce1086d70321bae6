"""N processes of one program on this machine, ended together and restarted together.

    python launch/local.py --processes 2 --devices-per-process 4 -- .venv/bin/fac train configs/quickstart.yaml

Every process gets the command that follows `--`, and behind it `--mesh.coordinator HOST:PORT --mesh.processes N
--mesh.process-id I`. JAX cannot lose or replace one process of a run, so a gang lives and dies as a whole: when one
process fails, the others have `--notice` seconds to see it themselves, then SIGTERM, then, after `--grace` seconds,
SIGKILL (JAX's preemption service takes SIGTERM for a request to save, and a stopped process does not even see it). The
gang then starts again, on a new port, from what it saved: at most `--restarts` times, and not when the first to fail
ended with 1 or 2 (an error that a person must mend) or 130 (Ctrl-C).

SIGTERM, SIGINT and SIGHUP to this launcher go to every process as SIGTERM and end the run; a second one is SIGKILL.
Output is passed on line by line behind `[I] `; the last line, on stderr, says why the run ended. Exit status: 0 when
every process ended with 0; 143, 130 or 129 when the launcher was stopped; otherwise that of the first process to fail
(128 + n when signal n killed it). Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import IO

FINAL = {1: "an error that a restart does not mend", 2: "wrong usage", 130: "Ctrl-C"}


@dataclass(frozen=True)
class Settings:
    """How many processes, what each of them gets, and how patient the launcher is (seconds)."""

    processes: int
    devices: int | None
    gpus: int | None
    restarts: int
    notice: float
    grace: float


@dataclass(frozen=True)
class Ended:
    """A process that ended, or (index None) a signal to the launcher."""

    index: int | None
    code: int
    """Exit status, or -n for signal n."""

    @property
    def status(self) -> int:
        """As a shell counts: 128 + n for signal n."""
        return self.code if self.code >= 0 else 128 - self.code

    def __str__(self) -> str:
        if self.code < 0:
            return f"process {self.index} was killed by {_name(-self.code)}"
        return f"process {self.index} ended with exit status {self.code}"


@dataclass(frozen=True)
class Outcome:
    """How a gang ended: who failed first, if any did, and the signal that stopped the launcher, if one did."""

    failure: Ended | None
    stop: Ended | None


def main(arguments: list[str] | None = None) -> int:
    """Run the gang until it is done, stopped, or has failed too often; returns the exit status."""
    settings, command = _parse(sys.argv[1:] if arguments is None else arguments)
    events: queue.SimpleQueue[Ended] = queue.SimpleQueue()  # its put() may be called inside a signal handler
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: events.put(Ended(None, -received)))
    for restarts in range(settings.restarts + 1):
        outcome = Gang(settings, command, events).run()
        so_far = f"restarted {restarts} of {settings.restarts} times"
        if outcome.failure is None:
            _say(f"all {settings.processes} processes are done; {so_far}")
            return 0
        end, status = str(outcome.failure), outcome.failure.status
        if outcome.stop is not None:
            _say(f"stopped by {_name(-outcome.stop.code)}; {end}; not restarted ({so_far})")
            return outcome.stop.status
        if status in FINAL:
            _say(f"{end} ({FINAL[status]}); not restarted ({so_far})")
            return status
        if restarts < settings.restarts:
            _say(f"{end}; restarting all {settings.processes} processes ({restarts + 1} of {settings.restarts})")
    _say(f"{end}; given up ({so_far})")
    return status


class Gang:
    """One start of all processes. Their ends and the launcher's signals arrive in one queue, in order."""

    def __init__(self, settings: Settings, command: list[str], events: queue.SimpleQueue[Ended]) -> None:
        self.settings = settings
        self.events = events
        self.lock = threading.Lock()
        self.children: dict[int, subprocess.Popen[bytes]] = {}  # those still running
        self.threads: list[threading.Thread] = []
        coordinator = f"127.0.0.1:{free_port()}"
        for index in range(settings.processes):
            child = subprocess.Popen(
                [*_dying_with_us(), *command, *mesh_flags(coordinator, settings.processes, index)],
                env=environment(settings, index),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                process_group=0,  # signals reach what a child starts, and the terminal's Ctrl-C reaches only us
            )
            self.children[index] = child
            assert child.stdout is not None and child.stderr is not None
            readers = [
                threading.Thread(target=_pass_on, args=(child.stdout, sys.stdout.buffer, index), daemon=True),
                threading.Thread(target=_pass_on, args=(child.stderr, sys.stderr.buffer, index), daemon=True),
            ]
            waiter = threading.Thread(target=self._await_end, args=(index, child, readers), daemon=True)
            self.threads += [*readers, waiter]
        for thread in self.threads:
            thread.start()

    def run(self) -> Outcome:
        """Wait for the end of every process; hasten it after the first failure or a signal to the launcher."""
        failure: Ended | None = None
        stop: Ended | None = None
        running = self.settings.processes
        steps: list[tuple[float, int]] = []  # when to send which signal, soonest first
        while running:
            event = self._next(steps[0][0] if steps else None)
            now = time.monotonic()
            if event is None:
                self._signal(steps.pop(0)[1])
            elif event.index is None:
                # The first signal asks for a save, the next means: now.
                steps = [(now, signal.SIGKILL)]
                if stop is None:
                    steps = [(now, signal.SIGTERM), (now + self.settings.grace, signal.SIGKILL)]
                    stop = event
            else:
                running -= 1
                if event.status != 0 and failure is None:
                    failure = event
                    if stop is None:
                        term = now + self.settings.notice
                        steps = [(term, signal.SIGTERM), (term + self.settings.grace, signal.SIGKILL)]
        for thread in self.threads:
            thread.join(timeout=5)  # a program that left its process group may hold the output open
        return Outcome(failure, stop)

    def _next(self, until: float | None) -> Ended | None:
        """The next event, or None when it is time for the next signal."""
        try:
            return self.events.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
        except queue.Empty:
            return None

    def _signal(self, number: int) -> None:
        with self.lock:  # no process is reaped meanwhile, so that no number here can belong to a stranger
            for child in self.children.values():
                _signal_group(child, number)

    def _await_end(self, index: int, child: subprocess.Popen[bytes], readers: list[threading.Thread]) -> None:
        if hasattr(os, "waitid"):  # absent on macOS before Python 3.13
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # not reaped yet: its group keeps its number
        else:
            child.wait()
        with self.lock:
            _signal_group(child, signal.SIGKILL)  # what it started and left behind
            code = child.wait()
            del self.children[index]
        for reader in readers:
            reader.join(timeout=1)  # its last words come before the launcher's
        self.events.put(Ended(index, code))


def mesh_flags(coordinator: str, processes: int, index: int) -> list[str]:
    """What tells a process of fac which one it is."""
    return [
        *("--mesh.coordinator", coordinator),
        *("--mesh.processes", str(processes)),
        *("--mesh.process-id", str(index)),
    ]


def environment(settings: Settings, index: int) -> dict[str, str]:
    """The launcher's environment, with this process's share of the devices."""
    result = dict(os.environ)
    result.setdefault("PYTHONUNBUFFERED", "1")  # into a pipe Python would otherwise hold lines back
    if settings.devices is not None:
        flag = f"--xla_force_host_platform_device_count={settings.devices}"  # of several, XLA heeds the last
        result["XLA_FLAGS"] = f"{result.get('XLA_FLAGS', '')} {flag}".strip()
    if settings.gpus is not None:
        count = settings.processes * settings.gpus
        visible = result.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        result["CUDA_VISIBLE_DEVICES"] = ",".join(visible[index * settings.gpus : (index + 1) * settings.gpus])
    return result


def free_port() -> int:
    """A TCP port that nobody listened on a moment ago; the coordinator fails at once if someone took it since."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _parse(arguments: list[str]) -> tuple[Settings, list[str]]:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        usage="python launch/local.py --processes N [options] -- COMMAND [ARGUMENT ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=_count, required=True, metavar="N", help="how many processes")
    parser.add_argument(
        "--devices-per-process",
        type=_count,
        metavar="N",
        help="virtual CPU devices of each process; they matter where JAX runs on the CPU",
    )
    parser.add_argument(
        "--gpus-per-process",
        type=_count,
        metavar="N",
        help="process I sees the I-th N of CUDA_VISIBLE_DEVICES, or of GPUs 0, 1, ...; without it, all see all",
    )
    parser.add_argument("--restarts", type=_whole, default=3, metavar="N", help="restarts of the gang (default: 3)")
    parser.add_argument("--notice", type=_seconds, default=20, metavar="S", help="seconds before SIGTERM (default: 20)")
    parser.add_argument("--grace", type=_seconds, default=60, metavar="S", help="seconds before SIGKILL (default: 60)")
    if "--" not in arguments and not {"-h", "--help"} & set(arguments):
        parser.error("the command comes after `--`, for instance: -- .venv/bin/fac train CONFIG")
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    command = arguments[len(own) + 1 :]
    parsed = parser.parse_args(own)
    if not command or shutil.which(command[0]) is None:
        parser.error(f"{command[0]!r} is not a program" if command else "no command after `--`")
    settings = Settings(
        processes=parsed.processes,
        devices=parsed.devices_per_process,
        gpus=parsed.gpus_per_process,
        restarts=parsed.restarts,
        notice=parsed.notice,
        grace=parsed.grace,
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if settings.gpus and visible is not None and len(visible.split(",")) < settings.processes * settings.gpus:
        wanted = f"{settings.processes} processes with {settings.gpus} GPUs each"
        parser.error(f"{wanted} do not fit CUDA_VISIBLE_DEVICES={visible}")
    return settings, command


def _whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _count(text: str) -> int:
    return _whole(text, 1)


def _seconds(text: str) -> float:
    if not text.replace(".", "", 1).isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return float(text)


def _dying_with_us() -> list[str]:
    """A prefix under which the kernel kills a process when this launcher is killed (Linux with util-linux only;
    elsewhere a SIGKILL of the launcher leaves the processes to themselves). Popen's preexec_fn could do the same, but
    is not safe in a program with threads."""
    return ["setpriv", "--pdeathsig", "KILL", "--"] if sys.platform == "linux" and shutil.which("setpriv") else []


def _pass_on(source: IO[bytes], target: IO[bytes], index: int) -> None:
    for line in source:
        with contextlib.suppress(BrokenPipeError):  # whoever read us is gone; the run goes on
            target.write(b"[%d] %s\n" % (index, line.removesuffix(b"\n")))
            target.flush()
    source.close()


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says so of a group of zombies
        os.killpg(child.pid, number)


def _name(number: int) -> str:
    known = {each.value: each.name for each in signal.Signals}
    return known.get(number, f"signal {number}")  # real-time signals have no name


def _say(text: str) -> None:
    print(f"launch/local.py: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
