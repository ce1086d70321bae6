"""What the sidecar serves and how its server is called: model, command line, environment variables, memory.

A .gguf file is written as a Hugging Face folder once, in bfloat16, into the user's cache folder, since these servers
read nothing else. Memory is looked at before anything is started, and too little is said with numbers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fac_jax import __version__
from fac_jax.config.file import Config
from fac_jax.config.llm import SidecarConfig
from fac_jax.corpus_files import local_files
from fac_jax.errors import UserError
from fac_jax.llm.cache import cache_folder
from fac_jax.llm.sidecar_environment import Say, holding
from fac_jax.runs import fingerprint, write_text

HOST = "127.0.0.1"
GENERATION = "generation_config.json"
BASE_GIB = 2.5
"""A vLLM server on a CPU without weights, keys and values: 2.2 GiB in four processes (measured with SmolLM2-135M in
float32 and a KV cache of 1 GiB), and what a batch takes."""
LIGHT_BASE_GIB = 1.0
GPU_BASE_GIB = 2.0
"""Of a GPU's share: the least that activations, keys and values need beside the weights."""
SECRET = re.compile(
    r"(^|_)(API_?KEY|ACCESS_KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_ID|_FILE|_PATH)?$", re.I
)
PYTHON_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""They would mix the caller's packages with those of the server's environment."""


@dataclass(frozen=True)
class Served:
    """The model that a server is to be given."""

    path: str
    """Hugging Face folder, or hub id."""
    name: str
    """What the server calls it."""
    local: bool
    """Whether it is on this machine, so that nothing has to be fetched."""


def chosen_kind(config: SidecarConfig) -> str:
    """The kind of server: `sidecar.kind`, or what this machine can run."""
    if config.kind != "auto":
        return config.kind
    return "vllm" if _gpus() else "vllm-cpu"


def model_source(config: Config) -> str:
    """The model as the config names it."""
    return config.backbone.model if config.sidecar.model is None else config.sidecar.model


def served_model(source: str, say: Say) -> Served:
    """The model at `source` in a form that a server reads. Raises UserError when it is not there or not whole."""
    if source.endswith(".gguf"):
        from fac_jax.llm.local import model_name  # imported late, as it brings jax

        return Served(str(_exported(source, say)), model_name(source), local=True)
    folder = Path(source).expanduser()
    if folder.is_dir():
        lacking = [
            what for what, pattern in {
                "config.json": "config.json", "*.safetensors": "*.safetensors", "tokenizer.json": "tokenizer*.json",
            }.items() if not list(folder.glob(pattern))
        ]  # fmt: skip
        if lacking:
            raise UserError(f"{source} holds no {' and no '.join(lacking)}; a server needs a whole Hugging Face model")
        return Served(str(folder.resolve()), folder.resolve().name, local=True)
    if source.startswith(("pkg://", ".", "~", "/")) or source.count("/") != 1:
        raise UserError(
            f"{source}: no such model; set sidecar.model to a hub id, a Hugging Face folder, a .gguf file or "
            "pkg://PACKAGE/FILE.gguf"
        )
    return Served(source, source, local=False)


def command(kind: str, python: str, model: Served, port: int, config: SidecarConfig) -> list[str]:
    """The command line of the server."""
    dtype = _dtype(kind, config)
    if kind == "transformers":
        # It calls the model as it was given on its command line: by its folder's name, in `working_folder`.
        program = [python, "-m", "transformers.cli.transformers", "serve", model.name]
        return [*program, "--host", HOST, "--port", str(port), "--dtype", dtype]
    # A request says how it is sampled. By default vLLM would add what the model's generation_config.json says, such as
    # a top-k or a repetition penalty; which tokens end a text it still takes from there.
    common = [
        "--served-model-name", model.name, "--host", HOST, "--port", str(port), "--dtype", dtype,
        "--max-model-len", str(config.context_tokens), "--generation-config", "vllm",
    ]  # fmt: skip
    if kind == "vllm-cpu":
        # This build carries another name than vLLM's, which `vllm serve` looks up, so it is called by its module.
        program = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model.path]
        return [*program, *common, "--enforce-eager"]
    share = ["--gpu-memory-utilization", str(config.gpu_memory_fraction), "--tensor-parallel-size", str(config.gpus)]
    return [python, "-m", "vllm.entrypoints.cli.main", "serve", model.path, *common, *share]


def working_folder(kind: str, model: Served) -> Path | None:
    """Where the server is to be started, if that matters."""
    return Path(model.path).parent if kind == "transformers" and model.local else None


def variables(kind: str, model: Served, config: Config) -> dict[str, str]:
    """Environment variables of the server: this process's own, without keys, and what the kind needs.

    It answers on loopback and needs no key of anyone; the hub's token goes along only where a model is to be fetched.
    """
    fetches = () if model.local else ("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN")
    keys = (config.llm.key_env, f"{config.llm.key_env}_FILE")
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in fetches or not (name in keys or name in PYTHON_VARIABLES or SECRET.search(name))
    }
    passed |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if model.local:
        passed["HF_HUB_OFFLINE"] = "1"
    if kind == "vllm-cpu":
        passed["VLLM_CPU_KVCACHE_SPACE"] = str(config.sidecar.kv_cache_gib)
    return passed


def check_memory(kind: str, model: Served, config: SidecarConfig) -> None:
    """Raise UserError when the server will not fit. A model that is still to be fetched counts as nothing."""
    gpus = _gpus() if kind == "vllm" else []
    if kind == "vllm" and len(gpus) < config.gpus:
        raise UserError(
            f"sidecar.kind vllm needs {config.gpus} NVIDIA GPU{'s' if config.gpus > 1 else ''} and nvidia-smi lists "
            f"{len(gpus)}; set sidecar.kind to vllm-cpu, or lower sidecar.gpus"
        )
    if kind == "vllm":
        _check_gpus(gpus[: config.gpus], model, config)
        return
    weights = _weights_gib(model, _dtype(kind, config))
    parts = f"{weights:.1f} for the weights, {BASE_GIB if kind == 'vllm-cpu' else LIGHT_BASE_GIB:g} for the server"
    need, mend = weights + LIGHT_BASE_GIB, "free some, or choose a smaller sidecar.model"
    if kind == "vllm-cpu":
        need = weights + BASE_GIB + config.kv_cache_gib
        parts += f", {config.kv_cache_gib} for keys and values (sidecar.kv_cache_gib)"
    free = available_gib()
    if need > free:
        raise UserError(f"the server needs {need:.1f} GiB of memory ({parts}) and {free:.1f} are free; {mend}")


def available_gib() -> float:
    """Memory that a new process can have: what the machine has left, or the container's limit leaves."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines() if ":" in line
    )
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        free = min(free, limit - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # no limit ("max"), or another kind of system
        pass
    return free / 2**30


def _check_gpus(gpus: list[tuple[float, float]], model: Served, config: SidecarConfig) -> None:
    share, count = config.gpu_memory_fraction, len(gpus)
    weights = _weights_gib(model, _dtype("vllm", config)) / count
    for index, (free, total) in enumerate(gpus):
        taken = share * total
        if taken > free:
            raise UserError(
                f"GPU {index} has {free:.1f} of {total:.1f} GiB free and the server takes {taken:.1f}; lower "
                f"sidecar.gpu_memory_fraction ({share:g}), or end what uses the GPU (JAX takes 75% of it unless "
                "XLA_PYTHON_CLIENT_MEM_FRACTION says less)"
            )
        if weights + GPU_BASE_GIB > taken:
            raise UserError(
                f"the model takes {weights:.1f} GiB and at least {GPU_BASE_GIB:g} beside it; the server's share of GPU "
                f"{index} is {taken:.1f} GiB: raise sidecar.gpu_memory_fraction ({share:g}) or sidecar.gpus ({count})"
            )


def _exported(source: str, say: Say) -> Path:
    """The .gguf file as a Hugging Face folder in the cache folder, written once for a file's content."""
    from fac_jax.backbone.export import export_hf
    from fac_jax.llm.local import model_name

    file = local_files(source)[0]
    # A folder of its own around it, so that its name is the model's: `transformers serve` knows it by nothing else.
    folder = cache_folder() / "models" / f"{fingerprint(file)}-bfloat16-{__version__}" / model_name(source)
    with holding(folder.parent / ".lock", f"another command writes {folder}", say):
        if not (folder / "config.json").exists():  # the folder appears only when it is whole
            say(f"writing {file.name} as a Hugging Face model, once: {folder}")
            export_hf(source, folder, "bfloat16")
        # `transformers serve` samples only where the model's own settings say so, whatever temperature a request has.
        settings = json.loads((folder / GENERATION).read_text(encoding="utf-8"))
        if not settings.get("do_sample"):
            write_text(folder / GENERATION, json.dumps(settings | {"do_sample": True}, indent=2) + "\n")
    return folder


def _dtype(kind: str, config: SidecarConfig) -> str:
    if config.dtype != "auto" or kind == "vllm" or (kind == "transformers" and _gpus()):
        return config.dtype
    from fac_jax.mesh import matmul_dtype

    return matmul_dtype("cpu")


def _weights_gib(model: Served, dtype: str) -> float:
    """Memory of the weights, from the headers of their files; auto is the type they are stored in."""
    if not model.local:
        return 0.0
    from fac_jax.backbone.hf_folder import SafetensorsFiles, local_fetch

    if dtype == "auto":
        return sum(file.stat().st_size for file in Path(model.path).glob("*.safetensors")) / 2**30
    files = SafetensorsFiles(model.path, local_fetch(Path(model.path)))
    numbers = sum(int(np.prod(shape, dtype=np.int64)) for shape in files.shapes(files.names()).values())
    return numbers * (2 if dtype == "bfloat16" else 4) / 2**30


def _gpus() -> list[tuple[float, float]]:
    """(free, total) GiB of each NVIDIA GPU that a server would see; empty without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen == "":
        return []
    if seen is not None:
        query.append(f"--id={seen}")
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        rows = [line.split(",") for line in said.splitlines() if line.strip()]
        return [(float(free) / 1024, float(total) / 1024) for free, total in rows]
    except (OSError, subprocess.SubprocessError, ValueError):  # a driver that does not answer serves nobody
        return []
