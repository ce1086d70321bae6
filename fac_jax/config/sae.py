"""`sae`, `train`, `sweep`, `splice`: the sparse autoencoder, training it or several, and the model's loss with it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from fac_jax.config.checks import check, check_layers

Variant = Literal["topk", "batchtopk", "jumprelu", "matryoshka"]


@dataclass(frozen=True)
class SaeConfig:
    """Shape of the sparse autoencoder, and which of its features are active."""

    features: int = 65_536
    """Number of features (paper: 65,536)."""
    k: int = 20
    """Features kept per token once annealing is over (paper: 20); their mean for batchtopk, its target for jumprelu."""
    activation: Literal["topk", "batchtopk", "jumprelu"] = "topk"
    """topk: the k best of each token (paper). batchtopk: the best of the whole batch, k a token on average, and a
    learned threshold afterwards (arXiv 2412.06410). jumprelu: a threshold per feature (arXiv 2407.14435)."""
    tied: bool = True
    """Whether the decoder's rows also encode (paper: yes)."""
    matryoshka: tuple[float, ...] = ()
    """Nested prefixes that must reconstruct alone, as growing fractions of the features that end in 1, such as
    .0625 .125 .25 .5 1 (arXiv 2503.17547); empty: none (paper)."""
    decoder_norm: Literal["free", "unit"] = "free"
    """free: rows of the decoder have any norm (paper). unit: they are rescaled to 1 after every step (OpenAI)."""
    row_cap: int = 4
    """batchtopk: a token keeps at most row_cap x k features; metrics.jsonl counts the tokens that reach it."""
    jump_width: float = 0.5
    """jumprelu: width of the rectangle that stands for the gradient of a step, in units of rows scaled to a median
    mean-square of 1."""
    sparsity_coefficient: float = 1.0
    """jumprelu: weight of (L0 / k - 1)^2 in the loss."""

    def __post_init__(self) -> None:
        check(
            0 < self.k <= self.features, f"sae.k is {self.k} and sae.features {self.features}; need 0 < k <= features"
        )
        check(self.row_cap >= 1, f"sae.row_cap is {self.row_cap}; it must be at least 1")
        check(self.jump_width > 0, f"sae.jump_width is {self.jump_width}; it must be above 0")
        check(
            self.sparsity_coefficient >= 0,
            f"sae.sparsity_coefficient is {self.sparsity_coefficient}; it must not be negative",
        )
        ends = self.prefixes
        check(
            not ends
            or (ends[0] >= 1 and ends[-1] == self.features and all(a < b for a, b in itertools.pairwise(ends))),
            f"sae.matryoshka is {self.matryoshka}; it must grow, end in 1, and each part must hold a feature "
            f"(of sae.features {self.features})",
        )
        check(
            not ends or self.activation != "jumprelu",
            "sae.matryoshka goes with sae.activation topk or batchtopk, not with jumprelu",
        )

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Features in each nested prefix; empty without nesting."""
        return tuple(round(share * self.features) for share in self.matryoshka)


@dataclass(frozen=True)
class TrainConfig:
    """Store, or backbone, to SAE."""

    compat: Literal["none", "official"] = "none"
    """official: the published code's initialisation, zero biases, Adam, no row filter and no auxiliary loss."""
    activations: Literal["store", "live"] = "store"
    """Where rows come from: a store, or live from the backbone while the SAE trains, with nothing on disk. live reads
    harvest.data over and over until the steps are done; of harvest, only data, validation_fraction and dtype count."""
    live_buffer_rows: int = 131_072
    """live: rows mixed together, at most; two such buffers take 2 x live_buffer_rows x 2 x d_model bytes of memory
    (2 GiB at width 4,096). More of them mix better."""
    store: str | None = None
    """Activation store to train on; by default the run's own."""
    on_bad_chunk: Literal["stop", "skip"] = "stop"
    """What a block does that `fac store verify` has quarantined: stop the training, or be left out and counted."""
    init: str | None = None
    """SAE to start from (folder, official .pth file, SAELens folder, or hub id); by default a random one."""
    steps: int = 10_000
    """Optimizer steps."""
    batch_rows: int = 4_096
    """Rows (tokens) in one step."""
    optimizer: Literal["adam", "adafactor"] = "adam"
    """adam keeps two numbers a parameter; adafactor (arXiv 1804.04235) one a row and a column: for very wide SAEs."""
    shard_optimizer: bool = False
    """Whether the optimizer's numbers are split over the mesh's data axis too, not only over features: less memory a
    device, more communication (ZeRO, arXiv 1910.02054, stage 1)."""
    weight_decay: float = 0.0
    """Of the decoder and encoder rows, decoupled from the gradient (AdamW); code: 0."""
    learning_rate: float = 1e-3
    """Rate after warm-up (paper: 1e-3)."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: constant (paper), or falling to 0 at the last step."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0."""
    k_schedule: Literal["linear", "exponential", "official"] = "linear"
    """How K falls from k_start to sae.k: linearly, by equal factors, or as the code does (linearly from 200 in 625
    steps, so that the first K is 199 and K is 20 from step 621 on)."""
    k_start: int = 200
    """K that the schedule starts from (code: 200)."""
    anneal_steps: int = 625
    """Steps over which K falls to sae.k (code: half of the first epoch, 625)."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss that revives dead features (0 turns it off)."""
    aux_k: int | None = None
    """Dead features of a token that share in the auxiliary reconstruction; by default half the residual's width
    (Gao et al. 2024, A.2)."""
    dead_after_rows: int = 10_000_000
    """A feature is dead when it has not been active for this many rows."""
    norm_filter: float = 10.0
    """Rows whose norm exceeds this many medians (attention sinks) are left out of the loss; 0 keeps all."""
    select_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Input type of the encoder matmul that selects the features; the selected activations and all gradients are
    float32 in any case. auto is bfloat16, or float32 with compat official and on CPUs that do not multiply bfloat16."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 200
    """Steps between checkpoints, each with a line of validation.jsonl; a killed run goes on from the last one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Best checkpoints that are kept beside them: those with the smallest fvu on held-out rows, once K has come down to
    sae.k."""
    finish: Literal["last", "best"] = "last"
    """Which state becomes the SAE: the last (paper), or the best checkpoint that is kept."""
    streams: int = 8
    """Parts that the store (live: the corpus) is read in, at most: with several hosts, each reads the parts its devices
    train on. It decides, and the number of hosts does not, which rows a batch holds."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_rows", "k_start", "aux_k", "dead_after_rows", "log_every"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"train.{name} is {value}; it must be at least 1")
        for name in ("checkpoint_every", "keep_checkpoints", "streams"):
            check(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; it must be at least 1")
        live = self.activations == "live"
        check(
            not (live and self.store is not None),
            f"train.activations live reads no store, but train.store is {self.store}: leave one of them out",
        )
        check(
            not live or self.live_buffer_rows >= self.batch_rows,
            f"train.live_buffer_rows {self.live_buffer_rows} holds less than train.batch_rows {self.batch_rows}: raise "
            "the first",
        )
        check(self.keep_best >= 0, f"train.keep_best is {self.keep_best}; it must be at least 0")
        check(
            self.finish == "last" or self.keep_best > 0,
            "train.finish best needs a best checkpoint: set train.keep_best to 1 or more",
        )
        for name in ("warmup_steps", "anneal_steps", "aux_coefficient", "norm_filter", "weight_decay"):
            check(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; it must be at least 0")
        check(
            0 < self.learning_rate < math.inf,
            f"train.learning_rate is {self.learning_rate}; it must be above 0 and finite",
        )
        check(
            self.k_start * self.anneal_steps < 2**31,
            f"train.k_start {self.k_start} x train.anneal_steps {self.anneal_steps} must be below 2^31; anneal faster",
        )


@dataclass(frozen=True)
class SweepConfig:
    """Several SAEs from one reading of the rows: all combinations of what is listed; what is not, is as in `sae`."""

    layers: tuple[int, ...] = ()
    """Values of backbone.layer, one after the other: a layer's rows are read once for all its SAEs. Their store holds
    them when they are in harvest.layers."""
    k: tuple[int, ...] = ()
    """Values of sae.k."""
    features: tuple[int, ...] = ()
    """Values of sae.features."""
    variants: tuple[Variant, ...] = ()
    """Values of sae.activation; matryoshka is sae.activation with sae.matryoshka (.0625 .125 .25 .5 1 if unset)."""
    seeds: tuple[int, ...] = ()
    """Seeds of the initialisation."""

    def __post_init__(self) -> None:
        check_layers("sweep", self.layers)


@dataclass(frozen=True)
class SpliceConfig:
    """The language model with the SAE spliced in: how much of its loss is recovered."""

    documents: int = 64
    """Held-out documents of harvest.data to measure on, the first ones of it; 0 leaves the stage out."""
    new_tokens: int = 40
    """Tokens of the greedy answer shown as a sample."""

    def __post_init__(self) -> None:
        for name, floor in {"documents": 0, "new_tokens": 1}.items():
            check(getattr(self, name) >= floor, f"splice.{name} is {getattr(self, name)}; it must be at least {floor}")
