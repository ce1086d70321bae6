"""The generation sidecar: a server on this machine, started, looked at and stopped by `fac sidecar`.

Started as a program of its own in a session of its own, on loopback only, and left running. Its log and the record of
what runs (`server.json`) lie in the run directory under `sidecar/`, so that any shell can ask for it and stop it; a
process counts as ours only by its id and its start together. What goes wrong is a UserError of one line.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import platform
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fac_jax.config.file import Config
from fac_jax.errors import UserError
from fac_jax.llm.exchange import read_models
from fac_jax.llm.process_group import Ended, Leader, alive, end, leader, members, memory_bytes, require_linux
from fac_jax.llm.sidecar_environment import Say, environment, holding
from fac_jax.llm.sidecar_log import cause, last_line
from fac_jax.llm.sidecar_server import (
    HOST,
    check_memory,
    chosen_kind,
    command,
    model_source,
    served_model,
    variables,
    working_folder,
)
from fac_jax.plain import from_plain, to_plain
from fac_jax.runs import write_text

STATE, LOG, PREVIOUS_LOG = "server.json", "server.log", "server.previous.log"
POLL_S = 0.2
ANSWER_S = 5.0
"""Seconds for a ready server to say that it is: one that is busy with many requests still answers in one."""
NOT_COMPARED = ("start_timeout_s", "stop_grace_s")
"""Settings that change nothing about a server that runs."""


@dataclass(frozen=True)
class Server:
    """A server that was started: what `server.json` holds."""

    process: Leader
    """The first of its processes, and the leader of their group."""
    host: str
    """Machine that it runs on."""
    kind: str
    """vllm, vllm-cpu or transformers."""
    model: str
    """Name of the model, as the server knows it."""
    port: int
    """Port on 127.0.0.1."""
    settings: dict[str, str]
    """What it was started with; a start with other settings is refused."""

    @property
    def flags(self) -> str:
        """What makes a command use it; a server that does not list its model needs to be told its name."""
        return f"--llm.url {self.url}" + (f" --llm.model {self.model}" if self.kind == "transformers" else "")

    @property
    def url(self) -> str:
        """Base URL for `llm.url`."""
        return f"http://{HOST}:{self.port}/v1"


@dataclass(frozen=True)
class Status:
    """What is known about the sidecar of a run."""

    state: Literal["ready", "silent", "dead", "absent"]
    """silent: its processes live and it does not answer, or not yet."""
    server: Server | None
    """None when it is absent."""
    processes: int
    """Of its group, alive."""
    memory_gib: float
    """Theirs together."""


def start(config: Config, say: Say, waiting: Say) -> tuple[Server, float]:
    """The server of this run, ready to answer, and after how many seconds: 0 when it was ready already.

    One that another command has started is waited for. `say` is told what is done once, `waiting` again and again how
    the wait goes. Raises UserError when a server runs with other settings, the port is taken, the model is not there,
    memory is too small, or the server dies or is not ready in time; what this call has started is then ended.
    """
    require_linux()
    folder, settings = _folder(config), _settings(config)
    began = time.monotonic()
    server, ours = _running(folder, settings, say), False
    if server is not None and _answers(server, ANSWER_S):
        return server, 0.0
    if server is None:
        server, ours = _launch(config, folder, settings, say)
    try:
        _wait(server, folder, config.sidecar.start_timeout_s, waiting)
    except BaseException:
        if ours:
            end(server.process, config.sidecar.stop_grace_s)
            _forget(folder, server)
        raise
    return server, time.monotonic() - began


def status(config: Config) -> Status:
    """Whether the sidecar of this run lives and answers; changes nothing."""
    require_linux()
    server = _read(_folder(config))
    if server is None:
        return Status("absent", None, 0, 0.0)
    processes = len(members(server.process))
    memory_gib = memory_bytes(server.process) / 2**30
    if not alive(server.process):
        return Status("dead", server, processes, memory_gib)
    return Status("ready" if _answers(server, ANSWER_S) else "silent", server, processes, memory_gib)


def stop(config: Config) -> tuple[Server, Ended] | None:
    """End all processes of the sidecar of this run; None when there is none."""
    require_linux()
    folder = _folder(config)
    server = _read(folder)
    if server is None:
        return None
    ended = end(server.process, config.sidecar.stop_grace_s)
    _forget(folder, server)
    return server, ended


def describe(config: Config) -> str:
    """`status` in a few words."""
    now = status(config)
    server, log = now.server, log_file(config)
    if server is None:
        return "no sidecar of this run is there; start one with `fac sidecar start`"
    what = f"{server.model} ({server.kind}, process {server.process.pid}, {server.url})"
    alive_now = f"{now.processes} processes, {now.memory_gib:.1f} GiB"
    if now.state == "ready":
        return f"{what} answers: {alive_now}; log: {log}"
    if now.state == "silent":
        return f"{what} does not answer, or not yet: {alive_now}; its log's last line: {last_line(log)} ({log})"
    left = f"; {alive_now} are left, which `fac sidecar stop` ends" if now.processes else ""
    return f"{what} has died: {cause(log)} ({log}){left}"


def describe_end(server: Server, ended: Ended) -> str:
    """What `stop` did, in a few words."""
    what = f"{server.model} ({server.kind}, process {server.process.pid}, port {server.port})"
    if not ended.processes:
        return f"{what} had ended already"
    how = "all by themselves" if not ended.killed else f"{ended.killed} of them only when killed"
    return f"{what} is stopped: {ended.processes} processes ended in {ended.seconds:.1f} s, {how}"


def log_file(config: Config) -> Path:
    """Where the server's log is."""
    return _folder(config) / LOG


def _folder(config: Config) -> Path:
    return Path(config.run.dir) / "sidecar"


def _settings(config: Config) -> dict[str, str]:
    """What decides about the server, as text, so that a difference can be shown."""
    given = {
        field.name: str(getattr(config.sidecar, field.name))
        for field in dataclasses.fields(config.sidecar)
        if field.name not in NOT_COMPARED
    }
    return given | {"kind": chosen_kind(config.sidecar), "model": model_source(config)}


def _read(folder: Path) -> Server | None:
    """The record of what was started. Raises UserError when it cannot be read, or is of another machine."""
    path = folder / STATE
    try:
        server = from_plain(Server, json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); end the server by hand if one runs, and delete it") from None
    if server.host != platform.node():
        raise UserError(
            f"the sidecar of {folder.parent} was started on {server.host}, and this is {platform.node()}: ask and stop "
            f"it there, choose another --run.dir, or delete {path} if that machine is gone"
        )
    return server


def _running(folder: Path, settings: dict[str, str], say: Say) -> Server | None:
    """The server that lives; None when none does. What a dead one left behind is ended."""
    server = _read(folder)
    if server is None:
        return None
    if not alive(server.process):
        ended = end(server.process, 0)
        if ended.processes:
            say(f"ended {ended.processes} processes that were left of a server that died")
        _forget(folder, server)
        return None
    names = sorted(settings.keys() | server.settings.keys())
    other = [
        f"sidecar.{name} {server.settings.get(name)} (asked: {settings.get(name)})"
        for name in names
        if server.settings.get(name) != settings.get(name)
    ]
    if other:
        raise UserError(
            f"a sidecar runs with other settings, at {server.url}: {', '.join(other)}; stop it with `fac sidecar stop` "
            "first, or choose another --run.dir for this one"
        )
    return server


def _launch(config: Config, folder: Path, settings: dict[str, str], say: Say) -> tuple[Server, bool]:
    """Start the server, unless another command has done so meanwhile; whether it was this one."""
    kind = settings["kind"]
    model = served_model(settings["model"], say)
    check_memory(kind, model, config.sidecar)  # before gigabytes are installed, and once more when they are
    _free_port(config.sidecar.port)
    python = config.sidecar.python or str(environment(kind, say))
    if "/" in python:
        python = os.path.abspath(python)  # the server may start in another folder
    with holding(folder / ".lock", "another command starts the sidecar of this run", say):
        there = _running(folder, settings, say)
        if there is not None:
            return there, False
        check_memory(kind, model, config.sidecar)
        port = _free_port(config.sidecar.port)
        words = command(kind, python, model, port, config.sidecar)
        process = _spawn(words, variables(kind, model, config), working_folder(kind, model), folder)
        server = Server(process, platform.node(), kind, model.name, port, settings)
        write_text(folder / STATE, json.dumps(to_plain(server), indent=2) + "\n")
    return server, True


def _spawn(words: Sequence[str], environ: dict[str, str], where: Path | None, folder: Path) -> Leader:
    """Start a program in a session of its own, its output in the log."""
    log = folder / LOG
    if log.exists():
        os.replace(log, folder / PREVIOUS_LOG)
    with open(log, "wb") as file:
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environ, cwd=where,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"{words[0]} cannot be started ({error.strerror}); correct sidecar.python, or leave it out"
            ) from None
    who = leader(process.pid)  # a zombie at worst: nobody has waited for it
    process.returncode = 0  # it outlives this command on purpose, which Popen would warn about
    return who


def _wait(server: Server, folder: Path, timeout_s: float, waiting: Say) -> None:
    """Until the server answers. Raises UserError when it dies or takes too long."""
    began, log = time.monotonic(), folder / LOG
    while True:
        seconds = time.monotonic() - began
        if not alive(server.process):
            _forget(folder, server)
            raise UserError(f"the server ended while it started{_how(server)}: {cause(log)}; its log is {log}")
        if _answers(server, 1.0):
            return
        if seconds > timeout_s:
            raise UserError(
                f"the server did not answer within {timeout_s:g} s (its log's last line: {last_line(log)}); see "
                f"{log}, or raise sidecar.start_timeout_s"
            )
        waiting(f"waiting for {server.kind}: {seconds:.0f} s; its log: {last_line(log)}")
        time.sleep(POLL_S)


def _how(server: Server) -> str:
    """How a child of this process ended, where that says more than its log."""
    try:
        _, result = os.waitpid(server.process.pid, os.WNOHANG)
    except ChildProcessError:
        return ""
    if os.WIFSIGNALED(result):
        name = signal.Signals(os.WTERMSIG(result)).name
        return f", ended by {name}{' (memory may have run out)' if name == 'SIGKILL' else ''}"
    return f" with status {os.WEXITSTATUS(result)}"


def _answers(server: Server, timeout_s: float) -> bool:
    """Whether it is healthy and serves its model."""
    try:
        _get(f"http://{HOST}:{server.port}/health", timeout_s)
        # `transformers serve` lists what is in the hub's cache, not what it serves, and fails where there is no cache.
        return server.kind == "transformers" or server.model in _model_names(server.url, timeout_s)
    except (OSError, ValueError):
        return False


def _model_names(url: str, timeout_s: float) -> list[str]:
    """Models that a server lists. Raises OSError or ValueError when it does not."""
    return [entry["id"] for entry in read_models(json.loads(_get(f"{url}/models", timeout_s)))]


def _get(url: str, timeout_s: float) -> bytes:
    # Without the environment's proxies: they are for other machines.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as reply:
            return reply.read(2**20)
    except urllib.error.HTTPError as error:
        error.close()
        raise
    except http.client.HTTPException as error:  # something that speaks no HTTP
        raise ValueError(str(error)) from None


def _free_port(port: int) -> int:
    """`port`, or a free one for 0. Raises UserError when something listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port that rests is free
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port} of {HOST} cannot be used ({error.strerror}){_who_listens(port)}") from None
        return int(probe.getsockname()[1])


def _who_listens(port: int) -> str:
    another = "choose another --sidecar.port (0: any free one)"
    try:
        names = _model_names(f"http://{HOST}:{port}/v1", 1.0)
    except (OSError, ValueError):
        return f"; {another}"
    return (
        f": a server for {', '.join(names)} answers there; use it with --llm.url http://{HOST}:{port}/v1, or {another}"
    )


def _forget(folder: Path, server: Server) -> None:
    """Delete the record, if it is still that of `server`."""
    if _read(folder) == server:
        (folder / STATE).unlink(missing_ok=True)
