"""launch/gke: the JobSet against its API's schema and by value, its shell for real, and the commands that go out."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.launch.jobset_schema import jobset_schema
from tests.launch.stubs import Stubs, write_program

GKE = Path(__file__).parents[2] / "launch" / "gke"
NEEDED = ("--name", "wide", "--image", "registry/fac:1", "--claim", "runs")


def submit(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(GKE / "submit.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, **more)


def rendered(*arguments: str, command: tuple[str, ...] = ("train", "x.yaml")) -> dict[str, Any]:
    done = submit(*NEEDED, "--print", *arguments, "--", *command)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def pod(jobset: dict[str, Any]) -> dict[str, Any]:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = jobset_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_jobset_is_what_the_api_accepts(validator: jsonschema.Draft202012Validator) -> None:
    for arguments in (("--topology", "16x16"), ("--topology", "2x2"), ("--topology", "4x4x8", "--tpu", "v5p")):
        validator.validate(rendered(*arguments, "--slices", "2"))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every key, but not inside maps whose keys are free (labels, resources)."""
    free = {"annotations", "nodeSelector", "limits"}
    if isinstance(value, dict):
        own = [(*path, key) for key in value] if not path or path[-1] not in free else []
        return own + [place for key, each in value.items() for place in _paths(each, (*path, key))]
    if isinstance(value, list):
        return [place for index, each in enumerate(value) for place in _paths(each, (*path, index))]
    return []


def test_every_misspelt_field_and_wrong_value_is_refused(validator: jsonschema.Draft202012Validator) -> None:
    """The schema is strict: each key of the JobSet, renamed, makes it invalid."""
    jobset = rendered("--topology", "16x16")
    places = _paths(jobset)
    assert len(places) > 40
    for path in places:
        broken = copy.deepcopy(jobset)
        holder: Any = broken
        for step in path[:-1]:
            holder = holder[step]
        holder[path[-1] + "x"] = holder.pop(path[-1])
        assert not validator.is_valid(broken), f"{path} misspelt was accepted"
    for field, wrong in {"maxRestarts": "three", "restartStrategy": "Never"}.items():
        broken = copy.deepcopy(jobset)
        broken["spec"]["failurePolicy"][field] = wrong
        assert not validator.is_valid(broken)


def test_a_gang_is_one_pod_per_host_that_fails_and_restarts_as_a_whole() -> None:
    jobset = rendered("--topology", "16x16", "--restarts", "5", "--grace", "240")
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert jobset["spec"]["failurePolicy"] == {
        "maxRestarts": 5,
        "restartStrategy": "BlockingRecreate",
        "rules": [{"name": "to_be_mended", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert job["replicas"] == 1 and spec["parallelism"] == spec["completions"] == 64 and spec["backoffLimit"] == 0
    assert spec["completionMode"] == "Indexed"  # which sets JOB_COMPLETION_INDEX
    assert spec["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"containerName": "fac", "operator": "In", "values": [1, 2, 130]}}
    ]
    assert pod(jobset)["restartPolicy"] == "Never" and pod(jobset)["terminationGracePeriodSeconds"] == 240
    assert pod(jobset)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    (container,) = pod(jobset)["containers"]
    assert container["name"] == "fac" and container["image"] == "registry/fac:1"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]
    assert pod(jobset)["volumes"] == [{"name": "data", "persistentVolumeClaim": {"claimName": "runs"}}]


@pytest.mark.parametrize(
    ("arguments", "accelerator", "hosts", "chips"),
    [
        (("--topology", "2x2"), "tpu-v5-lite-podslice", 1, 4),
        (("--topology", "1x1"), "tpu-v5-lite-podslice", 1, 1),
        (("--topology", "2x4", "--chips-per-host", "8"), "tpu-v5-lite-podslice", 1, 8),
        (("--topology", "4x4x8", "--tpu", "v5p"), "tpu-v5p-slice", 32, 4),
        (("--topology", "16x16", "--tpu", "v6e"), "tpu-v6e-slice", 64, 4),
        (("--topology", "4x4x4", "--tpu", "v4"), "tpu-v4-podslice", 16, 4),
    ],
)
def test_hosts_follow_from_the_topology(arguments: tuple[str, ...], accelerator: str, hosts: int, chips: int) -> None:
    jobset = rendered(*arguments)
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["completions"] == hosts
    assert pod(jobset)["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips
    assert pod(jobset)["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator


def test_every_pod_runs_fac_with_its_own_place(tmp_path: Path) -> None:
    """The container's command, run here as Kubernetes would, with the variables of pod 3 of slice 1 of 2."""
    words = ("train", "my config.yaml", "--run.dir=/data/$(HOSTNAME) $x", "--a", "it's")
    (container,) = pod(rendered("--topology", "4x4", "--slices", "2", command=words))["containers"]
    write_program(tmp_path / "fac", f"#!{sys.executable}\nimport os, sys\nprint(os.getpid(), sys.argv[1:])\n")
    (address,) = [each["value"] for each in container["env"] if each["name"] == "COORDINATOR"]
    fields = {
        each["name"]: each["valueFrom"]["fieldRef"]["fieldPath"] for each in container["env"] if "valueFrom" in each
    }
    assert fields == {"SLICE": "metadata.annotations['jobset.sigs.k8s.io/job-index']"}
    assert address == "wide-fac-0-0.wide:8482"  # <jobset>-<replicated job>-<job>-<pod>.<jobset>
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLICE": "1",
        "JOB_COMPLETION_INDEX": "3",
        "COORDINATOR": address,
    }
    arguments = [word.replace("$$", "$") for word in container["args"]]  # as Kubernetes unescapes them
    with subprocess.Popen(
        [*container["command"], *arguments], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        out, _ = process.communicate(timeout=30)
    mesh = ["--mesh.coordinator", address, "--mesh.processes", "8", "--mesh.process-id", "7"]
    assert (
        out == f"{process.pid} {[*words, *mesh]}\n"
    )  # exec: the container's first process is fac, which SIGTERM reaches


def test_submitting_applies_the_yaml_and_returns_kubectls_status(stubs: Stubs) -> None:
    stubs.add("kubectl", "sys.exit(3 if 'refused' in stdin else 0)", reads_stdin=True)
    arguments = (*NEEDED, "--topology", "4x4")
    done = submit(*arguments, "--", "train", "x.yaml", env=stubs.environment())
    assert done.returncode == 0 and stubs.calls("kubectl") == [["apply", "-f", "-"]]
    assert yaml.safe_load(stubs.stdin("kubectl")[0]) == rendered("--topology", "4x4")
    assert submit(*arguments, "--", "train", "refused.yaml", env=stubs.environment()).returncode == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*NEEDED, "--topology", "16x16"), "what fac shall do comes after `--`"),
        ((*NEEDED, "--topology", "16x16", "--"), "nothing after `--`"),
        ((*NEEDED, "--topology", "16", "--", "train"), "'16' is not of the form 16x16"),
        ((*NEEDED, "--topology", "4x4", "--tpu", "v9", "--", "train"), "invalid choice"),
        ((*NEEDED, "--topology", "4x4", "--name", "Wide_1", "--", "train"), "'Wide_1' must be at most 40 of"),
        (("--topology", "4x4", "--", "train"), "required: --name, --image, --claim"),
    ],
)
def test_wrong_usage_is_said_before_kubectl_is_called(arguments: tuple[str, ...], message: str, stubs: Stubs) -> None:
    stubs.add("kubectl")
    done = submit(*arguments, env=stubs.environment())
    assert done.returncode == 2 and message in done.stderr and not stubs.calls("kubectl")


def test_xpk_is_asked_for_the_same_gang(stubs: Stubs) -> None:
    stubs.add("xpk")
    words = ["train", "my config.yaml", "--run.dir", "/data/it's"]
    done = subprocess.run(
        ["bash", str(GKE / "xpk.sh"), "wide", "v5litepod-256", *words],
        env=stubs.environment(CLUSTER="mine", IMAGE="registry/fac:1", FAC_RESTARTS="5"),
        timeout=30,
    )
    assert done.returncode == 0
    (call,) = stubs.calls("xpk")
    options = dict(zip(call[2::2], call[3::2], strict=True))
    command = options.pop("--command")
    assert call[:2] == ["workload", "create"] and options == {
        "--cluster": "mine",
        "--workload": "wide",
        "--tpu-type": "v5litepod-256",
        "--num-slices": "1",
        "--docker-image": "registry/fac:1",
        "--max-restarts": "5",
        "--restart-on-exit-codes": "70,71",
        "--termination-grace-period-seconds": "180",
    }
    assert command.startswith("exec fac train ")
    shown = f'fac() {{ {sys.executable} -c "import sys; print(sys.argv[1:])" "$@"; }}; {command.removeprefix("exec ")}'
    out = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, timeout=30).stdout
    assert out == f"{[*words, '--mesh.coordinator', 'auto']}\n"


def test_xpk_needs_a_cluster_and_an_image(stubs: Stubs) -> None:
    stubs.add("xpk")
    command = ["bash", str(GKE / "xpk.sh"), "wide", "v5litepod-256", "train"]
    done = subprocess.run(command, env=stubs.environment(CLUSTER="mine"), capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "usage: CLUSTER=NAME IMAGE=IMAGE" in done.stderr and not stubs.calls("xpk")


def test_the_image_installs_the_project_for_tpus_and_copies_what_exists() -> None:
    lines = (GKE / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied and all((GKE.parents[1] / name).exists() for name in copied)
    assert any(line.startswith("RUN pip install") and "[tpu]" in line for line in lines)
