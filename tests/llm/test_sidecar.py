"""A stand-in server, started, looked at and stopped as a real process: by the command line and by other shells."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fac_jax import cli
from fac_jax.config.activations import BackboneConfig
from fac_jax.config.file import Config
from fac_jax.config.llm import LlmConfig, SidecarConfig
from fac_jax.config.machine import RunConfig
from fac_jax.errors import UserError
from fac_jax.llm import sidecar
from fac_jax.llm.process_group import Leader, alive, end, leader, members

SERVER = """
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
words, mode = sys.argv[1:], os.environ.get("STAND_IN", "")
open(os.environ["STAND_IN_SEEN"], "w").write(json.dumps({"words": words, "environment": dict(os.environ)}))
print("Loading safetensors checkpoint shards:  50%\\rLoading safetensors checkpoint shards: 100%", flush=True)
if mode == "dies":
    print("(EngineCore pid=7) ERROR 11-25 19:28:51 [core.py:9] ValueError: the context is too long for 1 GiB")
    print("(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.")
    sys.exit(3)
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('child', flush=True); time.sleep(60)"
if mode in ("stubborn", "leaves a child"):
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "silent":
    time.sleep(60)
time.sleep(float(os.environ.get("STAND_IN_LOADS_S", "0.4")))
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = words[words.index("--served-model-name") + 1]
        body = json.dumps({"data": [{"id": name}]}).encode() if self.path == "/v1/models" else b""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
server = ThreadingHTTPServer((words[words.index("--host") + 1], int(words[words.index("--port") + 1])), Handler)
print("INFO 11-25 19:28:51 [launcher.py:1] Application startup complete", flush=True)
server.serve_forever()
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """A run whose server is the stand-in, called by an interpreter's name with a real server's command line."""
    model = tmp_path / "tiny"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    save_file({"w": np.zeros((1024, 1024), np.float16)}, model / "model.safetensors")
    (tmp_path / "server.py").write_text(SERVER)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "{tmp_path}/server.py" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("STAND_IN_SEEN", str(tmp_path / "seen.json"))
    settings = SidecarConfig(
        "vllm-cpu", port=0, dtype="float32", python=str(python), start_timeout_s=20, stop_grace_s=0.5
    )
    made = Config(
        run=RunConfig(str(tmp_path / "run")), backbone=BackboneConfig(str(model)), llm=LlmConfig(key_env="MY_PASS"),
        sidecar=settings,
    )  # fmt: skip
    yield made
    monkeypatch.undo()
    sidecar.stop(made)


def start(config: Config) -> sidecar.Server:
    return sidecar.start(config, lambda text: None, lambda text: None)[0]


def changed(config: Config, **settings: object) -> Config:
    return dataclasses.replace(config, sidecar=dataclasses.replace(config.sidecar, **settings))  # type: ignore[arg-type]


def state_file(config: Config) -> Path:
    return Path(config.run.dir) / "sidecar" / sidecar.STATE


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_started_waited_for_seen_from_elsewhere_and_stopped(config: Config, tmp_path: Path) -> None:
    waits: list[str] = []
    server, seconds = sidecar.start(config, waits.append, waits.append)
    assert seconds >= 0.4 and waits and "waiting for vllm-cpu" in waits[-1]
    assert sidecar.start(config, waits.append, waits.append) == (server, 0.0)
    now = sidecar.status(config)
    assert (now.state, now.server, now.processes) == ("ready", server, 1) and 0.003 < now.memory_gib < 1
    # Another shell knows the run directory and nothing else.
    file = tmp_path / "c.yaml"
    file.write_text(f"run: {{dir: {config.run.dir}}}\n")
    asked = subprocess.run(
        [sys.executable, "-m", "fac_jax.cli", "sidecar", "stop", str(file)], capture_output=True, text=True, timeout=60
    )
    assert asked.returncode == 0 and "is stopped: 1 processes ended" in asked.stdout, asked.stderr
    assert is_free(server.port) and not alive(server.process) and not state_file(config).exists()
    assert sidecar.status(config).state == "absent" and sidecar.stop(config) is None


def test_the_server_is_told_what_was_asked_and_no_key(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {
        "MY_PASS": "k1", "MY_PASS_FILE": "k2", "OPENAI_API_KEY": "k3", "AWS_SECRET_ACCESS_KEY": "k4", "HF_TOKEN": "k5",
        "AWS_ACCESS_KEY_ID": "k6", "VLLM_API_KEY": "k7", "GOOGLE_APPLICATION_CREDENTIALS": "k8", "DB_PASSWORD": "k9",
    }  # fmt: skip
    for name, value in (secrets | {"PYTHONPATH": "/x", "TOKENIZERS_PARALLELISM": "true"}).items():
        monkeypatch.setenv(name, value)
    server = start(changed(config, context_tokens=512, kv_cache_gib=2))
    seen = json.loads((tmp_path / "seen.json").read_text())
    words, environment = seen["words"], seen["environment"]
    assert words[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    options = dict(zip(words[2:-1:2], words[3::2], strict=True))
    assert options == {
        "--model": str(tmp_path / "tiny"), "--served-model-name": "tiny", "--host": "127.0.0.1",
        "--port": str(server.port), "--dtype": "float32", "--max-model-len": "512", "--generation-config": "vllm",
    }  # fmt: skip
    assert words[-1] == "--enforce-eager"
    assert not (secrets.keys() | {"PYTHONPATH"}) & environment.keys()
    assert environment["TOKENIZERS_PARALLELISM"] == "true"
    assert (environment["VLLM_CPU_KVCACHE_SPACE"], environment["HF_HUB_OFFLINE"]) == ("2", "1")
    written = "".join(file.read_text() for file in state_file(config).parent.iterdir() if file.is_file())
    assert not any(value in written for value in ("k3", "k5"))


def test_other_settings_are_refused_and_named_while_it_runs(config: Config) -> None:
    server = start(config)
    with pytest.raises(UserError, match=r"sidecar.context_tokens 4096 \(asked: 64\); stop it with"):
        start(changed(config, context_tokens=64))
    assert start(changed(config, stop_grace_s=9.0)) == server  # what changes nothing about a server is no difference


def test_a_port_in_use_is_said_with_who_is_there(config: Config, tmp_path: Path) -> None:
    server = start(config)
    other = dataclasses.replace(changed(config, port=server.port), run=RunConfig(str(tmp_path / "other")))
    with pytest.raises(UserError, match=f"port {server.port} of 127.0.0.1 cannot be used .*a server for tiny answers"):
        start(other)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        with pytest.raises(UserError, match="cannot be used .Address already in use.; choose another --sidecar.port"):
            start(changed(other, port=mute.getsockname()[1]))
    assert sidecar.status(other).state == "absent"


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("dies", "ended while it started with status 3: ValueError: the context is too long for 1 GiB; its log is"),
        ("killed", "ended by SIGKILL .memory may have run out.: Loading safetensors checkpoint shards: 100%"),
    ],
)
def test_a_server_that_dies_is_quoted_in_one_line(
    config: Config, monkeypatch: pytest.MonkeyPatch, mode: str, says: str
) -> None:
    monkeypatch.setenv("STAND_IN", mode)
    with pytest.raises(UserError, match=says) as error:
        start(config)
    assert "\n" not in str(error.value) and not state_file(config).exists()
    monkeypatch.setenv("STAND_IN", "")
    start(config)
    assert (state_file(config).parent / sidecar.PREVIOUS_LOG).exists()  # the log of the failure is kept


def test_one_that_is_not_ready_in_time_is_ended(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STAND_IN", "silent")
    config = changed(config, start_timeout_s=1.0)
    with pytest.raises(UserError, match="did not answer within 1 s .*shards: 100%"):
        start(config)
    assert not state_file(config).exists()
    assert not any(str(tmp_path / "server.py").encode() in line for line in command_lines())


def command_lines() -> Iterator[bytes]:
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            yield (Path("/proc") / name / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue


def test_the_whole_group_is_killed_when_it_does_not_listen(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "stubborn")
    server = start(config)
    assert len(members(server.process)) == 2
    stopped = sidecar.stop(config)
    assert stopped is not None and (stopped[1].processes, stopped[1].killed) == (2, 2) and stopped[1].seconds >= 0.5
    assert members(server.process) == [] and is_free(server.port)


def test_what_a_dead_server_left_is_seen_and_ended(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "leaves a child")
    first = start(config)
    os.kill(first.process.pid, signal.SIGKILL)
    wait_until(lambda: not alive(first.process))
    now = sidecar.status(config)
    assert (now.state, now.processes) == ("dead", 1)
    assert "1 processes" in sidecar.describe(config) and "`fac sidecar stop` ends" in sidecar.describe(config)
    monkeypatch.setenv("STAND_IN", "")
    said: list[str] = []
    second, _ = sidecar.start(config, said.append, lambda text: None)
    assert said[0] == "ended 1 processes that were left of a server that died"
    assert members(first.process) == [] and second.process != first.process


def wait_until(true: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_number_that_another_process_has_now_is_never_signalled(config: Config) -> None:
    server = start(config)
    sidecar.stop(config)
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        now = leader(bystander.pid)
        for reused in (
            dataclasses.replace(now, tick=now.tick - 1),  # the number was given again
            dataclasses.replace(now, boot="another start of the machine"),
        ):
            stale = dataclasses.replace(server, process=reused)
            state_file(config).write_text(json.dumps(sidecar.to_plain(stale)))
            assert (sidecar.status(config).state, sidecar.status(config).processes) == ("dead", 0)
            stopped = sidecar.stop(config)
            assert stopped is not None and stopped[1].processes == 0
            assert "had ended already" in sidecar.describe_end(*stopped)
            assert bystander.poll() is None and alive(now)
        assert end(Leader(2**22 + 1, now.boot, 1), 0).processes == 0  # above the highest number there can be
    finally:
        bystander.kill()
        bystander.wait()


def test_a_start_that_was_killed_is_taken_up_by_the_next_one(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STAND_IN_LOADS_S", "4")
    program = f"""
import sys; sys.path.insert(0, {str(Path(cli.__file__).parents[2])!r})
from fac_jax.config.file import load_config
from fac_jax.llm import sidecar
sidecar.start(load_config({str(tmp_path / "c.yaml")!r}), print, print)
"""
    from fac_jax.config.file import to_yaml

    (tmp_path / "c.yaml").write_text(to_yaml(config))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL) as first:
        wait_until(state_file(config).exists, 30)
        first.kill()
    assert sidecar.status(config).state == "silent"
    recorded = json.loads(state_file(config).read_text())["process"]["pid"]
    assert start(config).process.pid == recorded


def test_of_another_machine_or_unreadable_it_is_left_alone(config: Config) -> None:
    server = start(config)
    state = state_file(config).read_text()
    state_file(config).write_text(json.dumps(sidecar.to_plain(dataclasses.replace(server, host="elsewhere"))))
    with pytest.raises(UserError, match="was started on elsewhere, and this is"):
        sidecar.stop(config)
    state_file(config).write_text("{")
    with pytest.raises(UserError, match="server.json cannot be read .*delete it"):
        sidecar.status(config)
    state_file(config).write_text(state)
    assert alive(server.process)


def test_the_command_line_says_what_to_do_next(
    config: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from fac_jax.config.file import to_yaml

    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(config))
    assert cli.main(["sidecar", "start", str(file)]) == 0
    out = capsys.readouterr().out
    server = sidecar.status(config).server
    assert server is not None and f"--llm.url http://127.0.0.1:{server.port}/v1" in out
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/v1/models")
    assert b"tiny" in connection.getresponse().read()
    connection.close()
    assert cli.main(["sidecar", "start", str(file)]) == 0 and "running already" in capsys.readouterr().out
    assert cli.main(["sidecar", "status", str(file)]) == 0 and "answers: 1 processes" in capsys.readouterr().out
    assert cli.main(["sidecar", "stop", str(file)]) == 0 and "is stopped" in capsys.readouterr().out
    assert cli.main(["sidecar", "halt", str(file)]) == 2 and "no 'halt'" in capsys.readouterr().err
    assert cli.main(["sidecar", "start", str(file), "--sidecar.python", "/nowhere"]) == 1
    assert "/nowhere cannot be started (No such file or directory)" in capsys.readouterr().err.replace("\n", "")
