"""`backbone` and `harvest`: the language model, and which of its activations are kept, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fac_jax.config.checks import check, check_layers
from fac_jax.plain import to_plain


@dataclass(frozen=True)
class BackboneConfig:
    """The language model whose residual stream is read."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub id, local Hugging Face directory, .gguf file, or pkg://PACKAGE/FILE inside an installed package."""
    layer: int = 16
    """Blocks applied before the residual is read: layer 16 equals Hugging Face hidden_states[16]
    (paper: 16 for Llama-3.1-8B and Mistral-7B, 14 for Qwen2-7B)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Input type of the matmuls, which accumulate in float32; norms, softmax and the residual stream are float32. auto:
    bfloat16 where the hardware multiplies it, and float32 on other CPUs."""
    rows_per_batch: int = 8
    """Packed rows in one forward pass."""
    row_tokens: int = 512
    """Tokens in a packed row; several documents share one, attention never crosses them."""

    def __post_init__(self) -> None:
        check(self.layer >= 1, f"backbone.layer is {self.layer}; it counts blocks applied, so it starts at 1")
        check(self.rows_per_batch >= 1, f"backbone.rows_per_batch is {self.rows_per_batch}; it must be at least 1")
        check(self.row_tokens >= 16, f"backbone.row_tokens is {self.row_tokens}; it must be at least 16")


@dataclass(frozen=True)
class HarvestConfig:
    """Corpus to activation store."""

    data: str = "corpus"
    """Name of the data set to harvest."""
    tokens: int | None = None
    """Rows (content tokens, training and validation together) to harvest, at least; by default the whole corpus."""
    validation_fraction: float = 0.1
    """Fraction of documents, by hash, whose rows are held out of training (paper: 90/10)."""
    shard_rows: int = 65_536
    """Rows shuffled together and written as one shard: the more, the better rows of different documents mix. A kill
    loses those not yet committed, of shards_at_once + 1 shards at most."""
    shards_at_once: int | None = None
    """Shards written at a time, each with 4 x shard_rows x d_model bytes of memory (1 GiB at width 4,096), and half of
    that for the one that fills; by default 1 in a folder and 4 in an object store, where one upload leaves the line
    half empty."""
    layers: tuple[int, ...] = ()
    """Layers whose residuals are kept besides those of backbone.layer, from the same forward pass; each gets a store of
    its own."""
    store: str | None = None
    """Folder or URL (gs://BUCKET/FOLDER, s3://BUCKET/FOLDER) for the rows; by default the run directory."""
    dtype: Literal["bfloat16", "float16", "int8"] = "bfloat16"
    """Type of the stored rows. float16 ends at 65,504, which massive activations exceed; int8 halves the bytes, with a
    scale per row and an error that the store states."""
    compression: Literal["none", "bitshuffle"] = "none"
    """bitshuffle (and zstd) takes about a quarter off bfloat16 rows, for slow or costly storage; it costs CPU time."""
    norm_filter: float = 0.0
    """Rows whose norm exceeds this many medians of their shard (attention sinks: 10 finds them) are left out of the
    store and counted; 0 keeps all."""

    def __post_init__(self) -> None:
        check_layers("harvest", self.layers)
        check(self.norm_filter >= 0, f"harvest.norm_filter is {self.norm_filter}; it must not be negative")
        check(
            0 < self.validation_fraction < 1,
            f"harvest.validation_fraction is {self.validation_fraction}; it must lie in (0, 1)",
        )
        check(self.shard_rows >= 128, f"harvest.shard_rows is {self.shard_rows}; it must be at least 128")
        at_once = self.shards_at_once
        check(at_once is None or at_once >= 1, f"harvest.shards_at_once is {at_once}; it must be at least 1")

    @property
    def content(self) -> dict[str, Any]:
        """The settings, as plain values, that decide what a store holds: `shards_at_once` changes no byte of it."""
        return {name: value for name, value in to_plain(self).items() if name != "shards_at_once"}
