"""launch/tpu_vm with a gcloud that has two hosts: folders of this machine, in which the real commands run.

The stub does what gcloud does with --worker=all: the command on all hosts at once, its output as it comes, in the end
the status of the first failed host by number. What ssh and Google's hosts do is not tested.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.stubs import Stubs, write_program

SCRIPTS = Path(__file__).parents[2] / "launch" / "tpu_vm"

GCLOUD = """
hosts = sorted(Path(os.environ["HOSTS"]).iterdir())
if sys.argv[4] == "scp":
    import shutil
    for host in hosts:
        shutil.copy(sys.argv[5], host / sys.argv[6].partition(":")[2])
    sys.exit(0)
command = next(word for word in sys.argv if word.startswith("--command=")).removeprefix("--command=")
def on(index):
    names = f"hostname() {{ echo t1v-n-abc-w-{index}; }}; export -f hostname; "
    where = {"HOME": str(hosts[index]), "HOST": str(index)}
    return subprocess.Popen(["bash", "-c", names + command], cwd=hosts[index], env={**os.environ, **where})
running = [on(index) for index in range(len(hosts))]
statuses = [each.wait() for each in running]
if os.environ.get("BREAKS") and " start " in command and calls == 3:
    statuses[1] = on(1).wait()  # a broken connection: gcloud connects again, to the same command
sys.exit(next((status for status in statuses if status), 0))
"""

INSTALL = """
fac_install() { mkdir -p .venv/bin && cp "$FAC" .venv/bin/fac && echo "$PYTHON" > python; }
"""


class Slice:
    """Two hosts, and a project with the scripts and a fac of the test's own."""

    def __init__(self, folder: Path, stubs: Stubs) -> None:
        self.stubs, self.root, self.hosts = stubs, folder / "my project", folder / "hosts"
        for index in range(2):
            (self.hosts / f"w{index}").mkdir(parents=True)
        for name in ("fac_jax", "configs", "launch"):
            (self.root / name).mkdir(parents=True)
        for name in ("pyproject.toml", "README.md"):
            (self.root / name).touch()
        shutil.copytree(SCRIPTS, self.root / "launch" / "tpu_vm")
        (self.root / "launch" / "install.sh").write_text(INSTALL)
        stubs.add("gcloud", GCLOUD)

    def begin(self, fac: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start run.sh; `fac` is a Python program in which `me` is the host's number and `start` counts its starts."""
        prelude = f"""#!{sys.executable}
import os, signal, sys, time
from pathlib import Path
me = int(os.environ["HOST"])
start = len(list(Path().glob("arguments-*")))
Path(f"arguments-{{start}}").write_text(" ".join(sys.argv[1:]))
"""
        program = self.root.parent / "fac"
        write_program(program, prelude + fac)
        paths = {"HOSTS": str(self.hosts), "FAC": str(program), "PYTHON": sys.executable}
        environment = self.stubs.environment(**{**paths, "FAC_NOTICE_S": "1", "FAC_GRACE_S": "1", **variables})
        # A shell that starts the tests in the background has SIGINT ignored, and bash cannot trap what it inherits so.
        heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('bash', sys.argv[1:])"
        script = str(self.root / "launch" / "tpu_vm" / "run.sh")
        command = [sys.executable, "-c", heed, "bash", script, "wide", "us-west4-a"]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*command, *(arguments or ("train", "x.yaml"))], stdout=pipe, stderr=pipe, text=True, env=environment
        )

    def __call__(self, fac: str, *arguments: str, **variables: str) -> tuple[int, str, list[str]]:
        """Exit status, stdout (all that came from the hosts), lines of stderr."""
        with self.begin(fac, *arguments, **variables) as process:
            out, err = process.communicate(timeout=60)
        return process.returncode, out, err.splitlines()

    def starts(self) -> list[list[str]]:
        """For each host: the arguments that fac got at each start."""
        folders = [self.hosts / f"w{index}" / "fac_jax" for index in range(2)]
        return [[file.read_text() for file in sorted(folder.glob("arguments-*"))] for folder in folders]

    def wait_for(self, name: str) -> None:
        for _ in range(500):
            if all((self.hosts / host / "fac_jax" / name).exists() for host in ("w0", "w1")):
                return
            time.sleep(0.02)
        raise AssertionError(f"{name} did not appear on both hosts in 10 s")


@pytest.fixture
def tpu(tmp_path: Path, stubs: Stubs) -> Slice:
    return Slice(tmp_path, stubs)


def test_the_project_is_copied_installed_and_run_on_all_hosts(tpu: Slice, stubs: Stubs) -> None:
    status, out, err = tpu("print('from fac')", "train", "x.yaml", "--run.dir", "/mnt/a b")
    assert status == 0, err
    copy, install, run = stubs.calls("gcloud")
    everywhere = ["--zone=us-west4-a", "--worker=all"]
    assert copy[:4] == ["compute", "tpus", "tpu-vm", "scp"] and copy[5:] == ["wide:fac_jax.tar.gz", *everywhere]
    assert install[:7] == run[:7] == ["compute", "tpus", "tpu-vm", "ssh", "wide", *everywhere]
    assert install[7].endswith("bash fac_jax/launch/tpu_vm/worker.sh install")
    identity = r"\d{8}-\d{6}-\d+-0"
    expected = rf"--command=FAC_GRACE_S=1 bash fac_jax/launch/tpu_vm/worker.sh start {identity} train x.yaml"
    assert re.match(expected, run[7]) and len(run) == 8
    assert tpu.starts() == [["train x.yaml --run.dir /mnt/a b --mesh.coordinator auto"]] * 2
    assert {"[0] from fac", "[1] from fac"} < set(out.splitlines())
    assert "worker t1v-n-abc-w-1 ended with exit status 0" in out
    assert err[-1] == "run.sh: all processes are done; restarted 0 of 3 times"


def test_an_installation_that_fails_is_not_followed_by_a_run(tpu: Slice, stubs: Stubs) -> None:
    (tpu.root / "launch" / "install.sh").write_text("fac_install() { return 7; }")
    status, _, err = tpu("")
    assert status == 7 and err[-1] == "run.sh: copying or installing failed with exit status 7"
    assert len(stubs.calls("gcloud")) == 2


def test_an_old_python_is_replaced(tpu: Slice, stubs: Stubs) -> None:
    """TPU VM images bring Python 3.10; then uv fetches one."""
    asked = f"""#!/bin/bash
[ "$1" != -c ] || exit 1
echo "$*" >> "{tpu.hosts.parent}/asked"
[ "$*" != "-m uv python find 3.12" ] || echo /home/me/python3.12
"""
    write_program(stubs.folder / "python3", asked)
    status, _, err = tpu("", PYTHON="")
    assert status == 0, err
    words = set((tpu.hosts.parent / "asked").read_text().splitlines())
    assert {"-m pip install --quiet --user uv", "-m uv python install --quiet 3.12"} < words
    assert (tpu.hosts / "w0" / "fac_jax" / "python").read_text() == "/home/me/python3.12\n"


def test_a_failed_gang_is_ended_and_restarted(tpu: Slice) -> None:
    """Host 1 fails first; host 0, which would go on for ever, is told to end and ends with a higher status."""
    status, out, err = tpu("if start == 0: os._exit(70) if me == 1 else time.sleep(60)")
    assert status == 0 and [len(each) for each in tpu.starts()] == [2, 2]
    assert "run.sh: worker t1v-n-abc-w-1 ended with exit status 70; restarting all processes (1 of 3)" in err
    assert "w-0 ended with exit status 143" in out
    assert err[-1] == "run.sh: all processes are done; restarted 1 of 3 times"


def test_restarts_have_a_limit(tpu: Slice) -> None:
    status, _, err = tpu("os.kill(os.getpid(), 9)", FAC_RESTARTS="1")
    assert status == 137 and [len(each) for each in tpu.starts()] == [2, 2]
    assert err[-1].endswith("ended with exit status 137; given up, restarted 1 of 1 times")


@pytest.mark.parametrize("code", [1, 2])
def test_what_a_person_must_mend_is_not_restarted(tpu: Slice, code: int) -> None:
    """gcloud returns the status of host 0; the first to fail, host 1, decides nevertheless."""
    status, _, err = tpu(f"os._exit({code}) if me == 1 else time.sleep(60)")
    assert status == code and [len(each) for each in tpu.starts()] == [1, 1]
    assert f"w-1 ended with exit status {code}, which a restart does not mend" in err[-1]


def test_a_broken_connection_does_not_start_half_a_gang(tpu: Slice) -> None:
    """gcloud calls the command again on the host that it lost; that must not start a process that nobody waits for."""
    status, out, err = tpu("", BREAKS="1")
    assert status == 0 and [len(each) for each in tpu.starts()] == [2, 2]
    assert "w-1 ended with exit status 71: its connection was lost" in out
    assert any("status 71: its connection was lost; restarting all processes (1 of 3)" in line for line in err)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_launcher_lets_every_host_save_and_restarts_nothing(
    tpu: Slice, number: signal.Signals, expected: int
) -> None:
    process = tpu.begin(
        """
def save(*_):
    time.sleep(0.3)
    print("saved")
    sys.stdout.flush()
    os._exit(143)
signal.signal(signal.SIGTERM, save)
Path("ready").touch()
time.sleep(60)
""",
        FAC_GRACE_S="20",
    )
    tpu.wait_for("ready")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == expected and {"[0] saved", "[1] saved"} < set(out.splitlines())
    assert "told to stop; worker " in err.splitlines()[-1] and [len(each) for each in tpu.starts()] == [1, 1]


@pytest.mark.parametrize(
    "deaf", ["signal.signal(signal.SIGTERM, signal.SIG_IGN)", "os.kill(os.getpid(), signal.SIGSTOP)"]
)
def test_what_does_not_end_after_sigterm_is_killed(tpu: Slice, deaf: str) -> None:
    process = tpu.begin(f"Path('ready').touch(); {deaf}; time.sleep(60)")
    tpu.wait_for("ready")
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and time.monotonic() - begin < 10
    assert "ended with exit status 137" in err.splitlines()[-1]


def test_a_start_ends_what_an_earlier_launcher_left_running(tpu: Slice) -> None:
    """A launcher that is killed leaves its processes; the next run takes the TPU from them."""
    program = "Path(f'pid-{start}').write_text(str(os.getpid())); (start == 0) and time.sleep(60)"
    process = tpu.begin(program)
    tpu.wait_for("pid-0")
    process.kill()
    process.stdout and process.stdout.close()
    process.stderr and process.stderr.close()
    process.wait()
    status, _, _ = tpu(program)
    assert status == 0
    for host in ("w0", "w1"):
        first = int((tpu.hosts / host / "fac_jax" / "pid-0").read_text())
        assert not Path(f"/proc/{first}").exists()


def test_wrong_usage(stubs: Stubs) -> None:
    stubs.add("gcloud")
    for script, arguments in (("run.sh", ["wide", "us-west4-a"]), ("worker.sh", ["begin"])):
        done = subprocess.run(
            ["bash", str(SCRIPTS / script), *arguments], capture_output=True, text=True, env=stubs.environment()
        )
        assert done.returncode == 2 and "usage: " in done.stderr
    assert not stubs.calls("gcloud")
