"""launch/local.py with real processes: small Python programs that end, fail and hang in every way a training can."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "launch" / "local.py"

# What every child begins with: `me` is its process id, `start` counts the gang's starts, `here` is the test's folder.
PRELUDE = """
import os, signal, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
me, here = int(flags["--mesh.process-id"]), Path(os.environ["HERE"])
start = len(list(here.glob(f"started-{me}-*")))
(here / f"started-{me}-{start}").write_text(f"{os.getpid()} {flags['--mesh.coordinator']}")
"""


class Launch:
    """Runs the launcher over a child program, in a folder where the children leave what the test reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, program: str, *options: str, **environment: str) -> subprocess.Popen[str]:
        (self.folder / "child.py").write_text(PRELUDE + program)
        command = [sys.executable, str(LAUNCHER), "--processes", "2", *options, "--"]
        command += [sys.executable, str(self.folder / "child.py")]
        environment = {**os.environ, "HERE": str(self.folder), **environment}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)

    def __call__(self, program: str, *options: str, **environment: str) -> tuple[int, list[str], list[str]]:
        """Exit status, lines of stdout, lines of stderr."""
        with self.begin(program, *options, **environment) as process:
            out, err = process.communicate(timeout=60)
        return process.returncode, out.splitlines(), err.splitlines()

    def starts(self) -> list[list[tuple[int, str]]]:
        """For each of the two processes: (process number of the system, coordinator) of its starts."""
        files = [sorted(self.folder.glob(f"started-{index}-*")) for index in range(2)]
        words = [[file.read_text().split() for file in each] for each in files]
        return [[(int(pid), coordinator) for pid, coordinator in each] for each in words]

    def wait_until_started(self) -> None:
        await_(lambda: all(self.folder.joinpath(f"ready-{index}").exists() for index in range(2)))


def await_(condition: object) -> None:
    assert callable(condition)
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited for 10 s in vain")


def alive(pid: int) -> bool:
    """Running (a zombie is not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path)


def test_every_process_gets_the_command_its_place_and_its_devices(launch: Launch) -> None:
    status, out, err = launch(
        "print(flags, os.environ['XLA_FLAGS'], os.environ.get('JAX_PLATFORMS'))",
        *("--devices-per-process", "4"),
        XLA_FLAGS="--xla_of_the_user=1",
        JAX_PLATFORMS="cpu",
    )
    assert status == 0 and err == ["launch/local.py: all 2 processes are done; restarted 0 of 3 times"]
    ((_, coordinator),), ((_, same),) = launch.starts()
    host, port = coordinator.split(":")
    assert coordinator == same and host == "127.0.0.1" and 1024 <= int(port) < 65536
    flags = {"--mesh.coordinator": coordinator, "--mesh.processes": "2"}
    devices = "--xla_of_the_user=1 --xla_force_host_platform_device_count=4"
    assert sorted(out) == [
        f"[{index}] { {**flags, '--mesh.process-id': str(index)} } {devices} cpu" for index in (0, 1)
    ]


@pytest.mark.parametrize(("visible", "shares"), [(None, ["0,1", "2,3"]), ("4,5,6,7", ["4,5", "6,7"])])
def test_gpus_are_dealt_out(
    launch: Launch, visible: str | None, shares: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    status, out, _ = launch("print(os.environ['CUDA_VISIBLE_DEVICES'])", "--gpus-per-process", "2", **environment)
    assert status == 0 and sorted(out) == [f"[0] {shares[0]}", f"[1] {shares[1]}"]
    status, _, err = launch("", "--gpus-per-process", "4", CUDA_VISIBLE_DEVICES="0,1,2")
    assert status == 2 and "2 processes with 4 GPUs each do not fit CUDA_VISIBLE_DEVICES=0,1,2" in err[-1]


def test_output_comes_line_by_line_and_at_once(launch: Launch) -> None:
    """Also what has no newline at its end, and what is not text; both streams stay apart."""
    program = """
sys.stdout.buffer.write(b"caf\\xc3\\xa9 x\\n\\nno newline"); print("to stderr", file=sys.stderr)
if me == 1: time.sleep(0.2)
"""
    status, out, err = launch(program)
    assert status == 0
    for index in (0, 1):
        assert [line for line in out if line.startswith(f"[{index}]")] == [
            f"[{index}] café x",
            f"[{index}] ",
            f"[{index}] no newline",
        ]
        assert f"[{index}] to stderr" in err
    process = launch.begin("print('first'); time.sleep(60)")
    assert process.stdout is not None and process.stdout.readline().endswith("first\n")  # before the program ends
    process.terminate()
    process.communicate(timeout=30)


@pytest.mark.parametrize(
    ("code", "what"), [("70", "ended with exit status 70"), ("-9", "was killed by SIGKILL"), ("143", "exit status 143")]
)
def test_a_failed_gang_is_restarted_as_a_whole_on_a_new_port(launch: Launch, code: str, what: str) -> None:
    program = f"""
code = {code}
if start == 0 and me == 1:
    os.kill(os.getpid(), -code) if code < 0 else os._exit(code)
if start == 0:
    time.sleep(60)
"""
    status, _, err = launch(program, "--notice", "0.2")
    first, second = launch.starts()
    assert status == 0 and len(first) == len(second) == 2
    assert [coordinator for _, coordinator in first] == [coordinator for _, coordinator in second]
    assert first[0][1] != first[1][1]
    assert "process 1" in err[0] and what in err[0] and err[0].endswith("restarting all 2 processes (1 of 3)")
    assert err[-1] == "launch/local.py: all 2 processes are done; restarted 1 of 3 times"


def test_a_gang_that_never_succeeds_is_given_up_at_the_limit(launch: Launch) -> None:
    status, _, err = launch("os._exit(71)", "--restarts", "2")
    assert status == 71 and [len(each) for each in launch.starts()] == [3, 3]
    assert err[-1].endswith("ended with exit status 71; given up (restarted 2 of 2 times)")
    status, _, err = launch("os.kill(os.getpid(), 6)", "--restarts", "0")
    assert status == 134 and "was killed by SIGABRT; given up" in err[-1]


@pytest.mark.parametrize("code", [1, 2, 130])
def test_what_a_person_must_mend_is_not_restarted(launch: Launch, code: int) -> None:
    """The first to fail decides: the other process, told to end, leaves with 70."""
    program = f"""
signal.signal(signal.SIGTERM, lambda *_: os._exit(70))
(here / f"ready-{{me}}").touch()
while me == 0 and not (here / "ready-1").exists(): time.sleep(0.01)
os._exit({code}) if me == 0 else time.sleep(60)
"""
    status, _, err = launch(program, "--notice", "0.2")
    assert status == code and [len(each) for each in launch.starts()] == [1, 1]
    assert f"process 0 ended with exit status {code} (" in err[-1] and "not restarted" in err[-1]


def test_the_others_may_notice_by_themselves_before_they_are_told(launch: Launch) -> None:
    program = """
signal.signal(signal.SIGTERM, lambda *_: print("told"))
if me == 1: os._exit(70)
time.sleep(0.5)
print("noticed")
os._exit(71)
"""
    status, out, err = launch(program, "--restarts", "0", "--notice", "30")
    assert status == 70 and out == ["[0] noticed"]


@pytest.mark.parametrize(
    "deaf", ["signal.signal(signal.SIGTERM, signal.SIG_IGN)", "os.kill(os.getpid(), signal.SIGSTOP)"]
)
def test_a_process_that_ignores_sigterm_or_is_stopped_is_killed(launch: Launch, deaf: str) -> None:
    program = f"""
if me == 1:
    while not (here / "ready-0").exists(): time.sleep(0.01)
    os._exit(71)
(here / "ready-0").touch()
{deaf}
time.sleep(60)
"""
    begin = time.monotonic()
    status, _, err = launch(program, "--restarts", "0", "--notice", "0.2", "--grace", "0.5")
    assert status == 71 and time.monotonic() - begin < 10 and "process 1 ended with exit status 71" in err[-1]
    ((pid, _),), _ = launch.starts()
    assert not alive(pid)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_stopped_launcher_asks_every_process_to_end_and_restarts_nothing(
    launch: Launch, number: signal.Signals, expected: int
) -> None:
    """SIGTERM reaches all of them, once; the launcher waits for their saves."""
    program = """
def save(*_):
    time.sleep(0.3)
    print("saved")
    os._exit(143)
signal.signal(signal.SIGTERM, save)
(here / f"ready-{me}").touch()
time.sleep(60)
"""
    process = launch.begin(program)
    launch.wait_until_started()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == expected and sorted(out.splitlines()) == ["[0] saved", "[1] saved"]
    last = err.splitlines()[-1]
    assert f"stopped by {number.name}; process " in last and "exit status 143; not restarted" in last
    assert [len(each) for each in launch.starts()] == [1, 1]


@pytest.mark.parametrize(("grace", "signals"), [("0.5", 1), ("60", 2)])
def test_a_stopped_launcher_escalates_after_the_grace_and_at_the_second_signal(
    launch: Launch, grace: str, signals: int
) -> None:
    program = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(here / f"ready-{me}").touch()
if me == 1: os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(60)
"""
    process = launch.begin(program, "--grace", grace)
    launch.wait_until_started()
    for _ in range(signals):
        process.terminate()
        time.sleep(0.2)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and "was killed by SIGKILL; not restarted" in err.splitlines()[-1]
    assert not any(alive(pid) for each in launch.starts() for pid, _ in each)


def test_a_run_that_finishes_although_it_was_asked_to_stop_is_done(launch: Launch) -> None:
    program = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
(here / f"ready-{me}").touch()
time.sleep(60)
"""
    process = launch.begin(program)
    launch.wait_until_started()
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "all 2 processes are done" in err.splitlines()[-1]


def test_what_a_process_started_ends_with_it(launch: Launch) -> None:
    program = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
(here / f"grandchild-{me}").write_text(str(child.pid))
os._exit(70 if me == 0 else 0)
"""
    begin = time.monotonic()
    status, _, _ = launch(program, "--restarts", "0")
    assert status == 70 and time.monotonic() - begin < 15
    for index in range(2):
        assert not alive(int((launch.folder / f"grandchild-{index}").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_no_process_survives_a_launcher_that_is_killed(launch: Launch) -> None:
    process = launch.begin("""(here / f"ready-{me}").touch(); time.sleep(60)""")
    launch.wait_until_started()
    process.kill()
    process.communicate(timeout=30)
    await_(lambda: not any(alive(pid) for each in launch.starts() for pid, _ in each))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "2"], "the command comes after `--`"),
        (["--processes", "2", "--"], "no command after `--`"),
        (["--processes", "2", "--", "no-such-program"], "'no-such-program' is not a program"),
        (["--processes", "0", "--", "true"], "'0' is not a whole number of at least 1"),
        (["--processes", "2", "--grace", "-1", "--", "true"], "'-1' is not a number of seconds"),
        (["--processes", "2", "--grace", "soon", "--", "true"], "'soon' is not a number of seconds"),
    ],
)
def test_wrong_usage_is_said_in_a_line(arguments: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, str(LAUNCHER), *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
