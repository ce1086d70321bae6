"""launch/slurm/run.sbatch under faked SLURM variables, with an srun that really starts the tasks, here.

The stub of srun does what the manual says: a task per process number, SIGTERM passed on to all of them, the others
ended when one fails (--kill-on-bad-exit), the highest status returned. What SLURM itself does is not tested.
"""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.launch.stubs import Stubs, write_program
from tests.sae.tiny_store import make_store

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm" / "run.sbatch"

SRUN = """
options = [word for word in sys.argv[1:sys.argv.index("bash")]]
command = sys.argv[1 + len(options):]
tasks = []
for index in range(int(os.environ["SLURM_NTASKS"])):
    step = {"SLURM_PROCID": str(index), "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"]}
    tasks.append(subprocess.Popen(command, env={**os.environ, **step}, process_group=0))
def tell(number, frame=None):
    for task in tasks:
        if task.poll() is None:
            os.killpg(task.pid, number)  # SLURM signals every process of a task, the shell too
signal.signal(signal.SIGTERM, tell)
told = False
while any(task.poll() is None for task in tasks):
    if not told and "--kill-on-bad-exit=1" in options and any(task.poll() for task in tasks):
        told = True
        time.sleep(0.1)
        tell(signal.SIGTERM)
    time.sleep(0.02)
sys.exit(max(code if code >= 0 else 128 - code for code in (task.returncode for task in tasks)))
"""


class Job:
    """A project's folder with a fac of the test's own, and the job's variables."""

    def __init__(self, folder: Path, stubs: Stubs) -> None:
        self.folder, self.stubs = folder, stubs
        self.id = random.randrange(1_000_000)  # the port hangs on it, and other tests may run beside these
        folder.mkdir()
        stubs.add("scontrol", "if sys.argv[1] == 'show': print('localhost\\nnode2')")
        stubs.add("srun", SRUN)
        self.variables = {
            "SLURM_JOB_ID": str(self.id),
            "SLURM_NTASKS": "2",
            "SLURM_JOB_NODELIST": "localhost,node2",
            "SLURM_SUBMIT_DIR": str(folder),
        }

    def begin(self, fac: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start the script; `fac` is a Python program in which `me` is the process id and `start` counts its starts."""
        prelude = f"""#!{sys.executable}
import os, signal, sys, time
from pathlib import Path
me = int(sys.argv[sys.argv.index("--mesh.process-id") + 1])
start = len(list(Path().glob(f"arguments-{{me}}-*")))
Path(f"arguments-{{me}}-{{start}}").write_text(" ".join(sys.argv[1:]))
"""
        write_program(self.folder / ".venv" / "bin" / "fac", prelude + fac)
        environment = self.stubs.environment(**{**self.variables, **variables})
        pipe = subprocess.PIPE
        command = ["bash", str(SCRIPT), *arguments]
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd="/")

    def __call__(self, fac: str, *arguments: str, **variables: str) -> tuple[int, str, list[str]]:
        """Exit status, stdout, lines of stderr."""
        with self.begin(fac, *(arguments or ("train", "x.yaml")), **variables) as process:
            out, err = process.communicate(timeout=120)
        return process.returncode, out, err.splitlines()

    def starts(self) -> list[list[str]]:
        """For each of the two processes: the arguments that fac got at each start."""
        return [[file.read_text() for file in sorted(self.folder.glob(f"arguments-{index}-*"))] for index in range(2)]

    def wait_for(self, *names: str) -> None:
        for _ in range(500):
            if all((self.folder / name).exists() for name in names):
                return
            time.sleep(0.02)
        raise AssertionError(f"{names} did not appear in 10 s")


@pytest.fixture
def job(tmp_path: Path, stubs: Stubs) -> Job:
    return Job(tmp_path / "project with space", stubs)


def test_two_processes_find_each_other_and_add_up(job: Job) -> None:
    """Real jax.distributed over what the script passes: a sum over both processes' devices."""
    program = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
flags = dict(zip(sys.argv[3::2], sys.argv[4::2]))
jax.distributed.initialize(
    flags["--mesh.coordinator"], int(flags["--mesh.processes"]), int(flags["--mesh.process-id"]),
    initialization_timeout=60,
)
devices = np.array(jax.devices())
place = NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data"))
mine = np.full((jax.local_device_count(),), 10.0 ** jax.process_index())
total = jax.jit(jnp.sum)(jax.make_array_from_process_local_data(place, mine))
print(f"sum {float(total)} over {len(devices)} devices in process {jax.process_index()} of {jax.process_count()}")
"""
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    status, out, err = job(program, **environment)
    assert status == 0, err
    found = re.findall(r"sum .*? of 2", out)  # gloo's C++ writes into the same lines
    assert sorted(found) == [f"sum 22.0 over 4 devices in process {index} of 2" for index in range(2)]
    assert err[-1] == "run.sbatch: all 2 processes are done; restarted 0 of 3 times"


def test_fac_trains_in_two_processes(job: Job, tmp_path: Path) -> None:
    """`fac train` itself, from a small store, on a mesh over both processes."""
    settings = {
        "backbone": {"model": "tiny", "layer": 3},
        "mesh": {"feature": 2},
        "sae": {"features": 64, "k": 4},
        "train": {
            "store": str(make_store(tmp_path / "store")), "steps": 3, "batch_rows": 32, "k_start": 4, "anneal_steps": 0,
            "aux_k": 8, "dead_after_rows": 100, "log_every": 1, "select_dtype": "float32",
        },
    }  # fmt: skip
    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(settings))
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    program = "from fac_jax.cli import main; sys.exit(main())"
    status, _, err = job(program, "train", str(config), "--run.dir", str(run), **environment)
    assert status == 0, err
    assert len((run / "sae" / "metrics.jsonl").read_text().splitlines()) == 3


def test_srun_and_fac_get_what_they_need(job: Job, stubs: Stubs) -> None:
    status, _, _ = job("", "train", "x.yaml", "--run.dir", "/shared/a b", "--train.steps=3")
    assert status == 0 and stubs.calls("scontrol") == [["show", "hostnames", "localhost,node2"]]
    (call,) = stubs.calls("srun")
    assert call[: call.index("bash")] == ["--kill-on-bad-exit=1", "--wait=0", "--cpu-bind=none", "--label"]
    assert call[-6:] == ["fac", "train", "x.yaml", "--run.dir", "/shared/a b", "--train.steps=3"]
    port = 61440 + job.id % 4096
    mesh = f"--mesh.coordinator localhost:{port} --mesh.processes 2 --mesh.process-id"
    assert job.starts() == [[f"train x.yaml --run.dir /shared/a b --train.steps=3 {mesh} {i}"] for i in range(2)]


def test_the_header_asks_for_whole_nodes_an_early_signal_and_requeueing() -> None:
    options = re.findall(r"^#SBATCH (.*)$", SCRIPT.read_text(), re.MULTILINE)
    assert {"--ntasks-per-node=1", "--exclusive", "--requeue", "--open-mode=append"} <= set(options)
    (early,) = re.findall(r"--signal=B:USR1@(\d+)", " ".join(options))
    (grace,) = re.findall(r"FAC_GRACE_S:-(\d+)", SCRIPT.read_text())
    assert int(early) >= int(grace) + 60, "the save must end before the time limit"
    # sbatch reads options only up to the first command.
    before, _, _ = SCRIPT.read_text().partition("\nset -uo pipefail")
    assert before.count("#SBATCH") == len(options) and all(line.startswith("#") for line in before.splitlines())


def test_a_failed_gang_is_restarted_on_another_port(job: Job) -> None:
    status, _, err = job("if start == 0: os._exit(70) if me == 1 else time.sleep(60)")
    assert status == 0 and [len(each) for each in job.starts()] == [2, 2]
    ports = [re.findall(r"localhost:(\d+)", arguments)[0] for arguments in job.starts()[0]]
    assert [int(port) for port in ports] == [61440 + (job.id + restart) % 4096 for restart in range(2)]
    assert "process 1 ended with exit status 70; restarting all 2 processes (1 of 3)" in " ".join(err)
    assert err[-1] == "run.sbatch: all 2 processes are done; restarted 1 of 3 times"
    assert not list(job.folder.glob(".fac-failed*"))


def test_a_killed_process_counts_and_restarts_have_a_limit(job: Job) -> None:
    status, _, err = job("os.kill(os.getpid(), 9) if me == 0 else time.sleep(60)", FAC_RESTARTS="1")
    assert status == 137 and [len(each) for each in job.starts()] == [2, 2]
    assert "process 0 ended with exit status 137; given up, restarted 1 of 1 times" in err[-1]


@pytest.mark.parametrize("code", [1, 2])
def test_what_a_person_must_mend_is_not_restarted_whatever_the_others_end_with(job: Job, code: int) -> None:
    """srun returns the highest status, that of the process it ended; the first to fail decides nevertheless."""
    status, _, err = job(f"os._exit({code}) if me == 1 else time.sleep(60)")
    assert status == code and [len(each) for each in job.starts()] == [1, 1]
    assert f"process 1 ended with exit status {code}, which a restart does not mend" in err[-1]


SAVES = """
def save(*_):
    time.sleep(0.3)
    print("saved", flush=True)
    os._exit(143)
signal.signal(signal.SIGTERM, save)
Path(f"ready-{me}").touch()
time.sleep(60)
"""


def test_sigterm_lets_every_process_save_and_restarts_nothing(job: Job, stubs: Stubs) -> None:
    process = job.begin(SAVES, "train", "x.yaml")
    job.wait_for("ready-0", "ready-1")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and out.count("saved") == 2 and [len(each) for each in job.starts()] == [1, 1]
    assert "told to stop (SIGTERM); process " in err.splitlines()[-1] and "exit status 143" in err.splitlines()[-1]
    assert all(call[0] == "show" for call in stubs.calls("scontrol"))


@pytest.mark.parametrize(("count", "queued"), [("0", True), ("20", False)])
def test_near_the_time_limit_the_job_saves_and_queues_itself_again(
    job: Job, stubs: Stubs, count: str, queued: bool
) -> None:
    process = job.begin(SAVES, "train", "x.yaml", SLURM_RESTART_COUNT=count)
    job.wait_for("ready-0", "ready-1")
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and out.count("saved") == 2
    assert (["requeue", str(job.id)] in stubs.calls("scontrol")) == queued
    assert ("queued again (1 of 20)" if queued else "told to stop (time limit)") in err.splitlines()[-1]


@pytest.mark.parametrize(
    "deaf", ["signal.signal(signal.SIGTERM, signal.SIG_IGN)", "os.kill(os.getpid(), signal.SIGSTOP)"]
)
def test_what_does_not_end_after_sigterm_is_killed(job: Job, deaf: str) -> None:
    """`timeout` in each task does it; SLURM's own KillWait, which comes with scancel, is not needed."""
    stop = "Path(f'ready-{me}').touch(); " + deaf + "; time.sleep(60)"
    process = job.begin(stop, "train", "x.yaml", FAC_GRACE_S="0.5")
    job.wait_for("ready-0", "ready-1")
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and time.monotonic() - begin < 10
    assert "ended with exit status 137" in err.splitlines()[-1]


def test_a_job_that_was_queued_again_too_often_a_missing_venv_and_no_verb_end_at_once(job: Job, stubs: Stubs) -> None:
    status, _, err = job("", SLURM_RESTART_COUNT="21")
    assert status == 1 and "queued again 21 times, more than FAC_REQUEUES=20" in err[-1]
    (job.folder / ".venv" / "bin" / "fac").unlink()
    done = subprocess.run(
        ["bash", str(SCRIPT), "train", "x.yaml"],
        env=stubs.environment(**job.variables),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1 and "has no .venv/bin/fac: submit from the project's folder" in done.stderr
    done = subprocess.run(["bash", str(SCRIPT)], env=stubs.environment(), capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr
    assert not stubs.calls("srun")
