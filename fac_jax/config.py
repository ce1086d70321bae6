"""One YAML file (over another that it names as its base), and dotted flags over it, become frozen dataclasses.

Reads YAML files; writes the resolved config (`to_yaml`) so that every product can keep the one it was made with.
Every field's docstring is its `--help`; where the paper (arXiv 2602.10388) or its code gives a value, it is quoted.
"""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from fac_jax.errors import UserError
from fac_jax.plain import from_plain, suggest, to_plain

Variant = Literal["topk", "batchtopk", "jumprelu", "matryoshka"]


def check(ok: bool, message: str) -> None:
    """Raise `UserError(message)` unless `ok`: validation where a value is born."""
    if not ok:
        raise UserError(message)


def check_layers(section: str, layers: Sequence[int]) -> None:
    """Raise UserError for a layer that cannot be one."""
    for layer in layers:
        check(layer >= 1, f"{section}.layers has {layer}; it counts blocks applied, so it starts at 1")


@dataclass(frozen=True)
class RunConfig:
    """Where a run keeps its products."""

    dir: str = "runs/default"
    """Run directory; every product of the run is written below it."""
    seed: int = 0
    """Seed of everything random in the run (initialisation, shuffling, sampling)."""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; both axes are 1 on a laptop."""

    data: int | None = None
    """Devices along the batch axis; by default all that `feature` leaves."""
    feature: int = 1
    """Devices along the SAE-feature and model-parallel axis."""
    coordinator: str | None = None
    """Several processes as one run: HOST:PORT of process 0, the same for all, or auto where JAX finds them (SLURM, Open
    MPI, Cloud TPU). By default this process is alone."""
    processes: int | None = None
    """How many processes there are; auto finds it."""
    process_id: int | None = None
    """Which of them this is, from 0; auto finds it."""
    start_timeout_s: int = 300
    """Seconds in which all processes must have started."""
    step_timeout_s: float = 20.0
    """Several processes: seconds without a finished training step (or ten times the slowest before, if that is longer)
    after which a process ends itself, and so all of them."""

    def __post_init__(self) -> None:
        explicit, parts = self.coordinator not in (None, "auto"), (self.processes, self.process_id)
        check(
            not explicit or (":" in str(self.coordinator) and None not in parts),
            f"mesh.coordinator {self.coordinator} needs the form HOST:PORT, mesh.processes and mesh.process_id (it has "
            f"{self.processes} and {self.process_id}); or set it to auto",
        )
        check(
            self.coordinator is not None or parts == (None, None),
            "mesh.processes and mesh.process_id need mesh.coordinator: set it to HOST:PORT of process 0",
        )
        count, index = self.processes, self.process_id
        check(
            count is None or index is None or 0 <= index < count,
            f"mesh.process_id is {index}; it must lie in 0 to {(count or 0) - 1}, as mesh.processes is {count}",
        )
        for name, least in {"start_timeout_s": 1, "step_timeout_s": 1}.items():
            check(getattr(self, name) >= least, f"mesh.{name} is {getattr(self, name)}; it must be at least {least}")


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
class Source:
    """Files of one kind, and which of their rows are taken."""

    path: str
    """File, glob, or pkg://PACKAGE/GLOB inside an installed package; s3://BUCKET/GLOB, gs://BUCKET/GLOB, or
    hf://datasets/OWNER/NAME[@REVISION][/GLOB]."""
    format: Literal["auto", "jsonl", "json", "csv", "tsv", "parquet", "txt", "chitchat"] = "auto"
    """How the file is read; auto goes by its ending (.gz and .zst are opened)."""
    text: str = "text"
    """Field with the user's text, or with a list of {role, content} messages."""
    label: str | None = None
    """Field with the label (true/false or a number; above 0.5 is positive)."""
    constant_label: float | None = None
    """Label of every row of this source, where the files have none."""
    skip_lines: int = 0
    """Lines skipped at the head of each file (csv and tsv)."""
    split: tuple[float, float] = (0.0, 1.0)
    """Rows whose hash of the document id, in [0, 1), lies in [low, high): fixed by content, not by order."""
    limit: int | None = None
    """Documents taken from this source, at most."""

    def __post_init__(self) -> None:
        low, high = self.split
        check(0 <= low < high <= 1, f"split is {self.split} for {self.path}; it must be 0 <= low < high <= 1")
        check(
            self.label is None or self.constant_label is None,
            f"{self.path} has both label: {self.label} and constant_label: {self.constant_label}; keep one",
        )


@dataclass(frozen=True)
class DataSet:
    """Documents from one or more sources."""

    sources: tuple[Source, ...] = ()
    """Where the documents come from, in this order."""
    without: tuple[Source, ...] = ()
    """Documents of these sources are left out, in whatever case and punctuation: what is held out must not be trained
    on. Their words are held in memory."""
    unique: bool = True
    """A document seen twice counts once. Its id is remembered for it, 0.1 GB a million documents; false for a corpus of
    any size that holds none twice: memory then does not depend on it."""
    sample: float = 1.0
    """Fraction of the documents kept, chosen by hash of the document id (paper: seed = a 10% subset)."""
    max_tokens: int = 256
    """Tokens of a document, template included, that are kept (code: 286 for Llama, 256 for others)."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A malformed row stops the run with its file and line, or is counted, listed and skipped."""

    def __post_init__(self) -> None:
        check(0 < self.sample <= 1, f"sample is {self.sample}; it must lie in (0, 1]")
        check(self.max_tokens >= 8, f"max_tokens is {self.max_tokens}; it must be at least 8")


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
    """Rows shuffled together and written as one shard: the more, the better rows of different documents mix. Two shards
    are in memory; a kill loses at most one."""
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
class ScanConfig:
    """Corpus to per-feature statistics and per-sample peaks."""

    acts: Literal["topk", "relu"] = "topk"
    """Which activations count: topk, the SAE's own (paper's formula; an SAE with a threshold keeps what exceeds it), or
    relu, with top-k and threshold off (paper's code)."""
    sae: str | None = None
    """SAE to scan with: folder, official .pth file, SAELens folder, or hub id; by default the run's own."""
    top_spans: int = 10
    """Top-scoring spans kept per feature (code: 10)."""
    span_tokens: int = 32
    """Tokens of a span, activating token included (code: 32)."""
    peaks: str = "all"
    """Features whose peaks are kept document by document, with the documents: all, none (statistics and spans only,
    whose size does not depend on the corpus), or a parquet file with a column `feature` (coverage/missing.parquet). Of
    the sets that the pipeline itself needs (anchor, seed, held-out, synthesised) all are kept."""
    share: str = "1/1"
    """Part of the data set that this command scans, such as 1/2 and 2/2, each perhaps on a machine of its own: the last
    one finishes the scan, or `fac scan merge` joins them. Changes nothing in the product."""

    @property
    def share_of(self) -> tuple[int, int]:
        """Index from 0, and count."""
        index, _, count = self.share.partition("/")
        return int(index) - 1, int(count)

    def __post_init__(self) -> None:
        index, slash, count = self.share.partition("/")
        fits = index.isdecimal() and bool(slash) and count.isdecimal() and 1 <= int(index) <= int(count)
        check(fits, f"scan.share is {self.share!r}; it must be INDEX/COUNT, counted from 1, such as 2/4")
        for name, floor in {"top_spans": 1, "span_tokens": 1}.items():
            check(getattr(self, name) >= floor, f"scan.{name} is {getattr(self, name)}; it must be at least {floor}")


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


@dataclass(frozen=True)
class ExplainConfig:
    """Features to text, and how well the text tells where a feature is active."""

    method: Literal["auto", "embedded"] = "auto"
    """Who explains. auto: the server at llm.url, or without one the embedded method; embedded: that in any case, for a
    server whose model can write and no more."""
    protocol: Literal["quantiles", "paper"] = "quantiles"
    """LLM method, which spans explain a feature. quantiles: half of them the strongest, the others from equal strata of
    the documents left, so that an explanation fits weak activations too, for as many requests; paper: the strongest,
    the last 10 tokens of each."""
    spans: int = 10
    """Spans shown per feature (code: 10)."""
    tokens: int = 8
    """Tokens named per feature by the embedded method."""
    features: int | None = None
    """LLM method: features that are explained, drawn with run.seed; by default all that are active on the anchor. The
    others are not judged either, so they never count as relevant: for a trial, or a server that is paid for."""
    scored_features: int | None = None
    """Features whose explanation is scored on held-out documents, drawn with run.seed; by default all. LLM method:
    4 requests for each with 10 scored spans, beside the 2 that explain it and check the explanation."""
    scored_spans: int = 10
    """Held-out spans of each kind that a score is made from (activating and silent; marked rightly and wrongly), at
    most. A request rates 10 spans."""
    control_features: int = 100
    """LLM method: features of those scored that are also scored by another feature's explanation, which must come out
    at 0.5; as many requests for each as a score. The embedded method does it for all: it costs nothing there."""
    generation_features: int | None = None
    """Features for which texts are written from the explanation alone and scored by the SAE, drawn with run.seed; by
    default 50 where a server explains, and none elsewhere: the backbone writes a text or two a second on a CPU."""
    generation_texts: int = 4
    """Texts for each of them: as many requests."""

    def __post_init__(self) -> None:
        least = {"spans": 1, "tokens": 1, "scored_spans": 3, "generation_texts": 1}
        counted = dict.fromkeys(("features", "scored_features", "control_features", "generation_features"), 0)
        for name, floor in {**least, **counted}.items():
            value = getattr(self, name)
            check(value is None or value >= floor, f"explain.{name} is {value}; it must be at least {floor}")


@dataclass(frozen=True)
class JudgeConfig:
    """Features to task relevance."""

    task: str = "toxicity"
    """Name of a task in fac_jax/features/tasks, or the path of a folder that holds one's own (README.md there)."""
    method: Literal["auto", "embedded"] = "auto"
    """Who judges. auto: the server at llm.url, or without one the embedded method, which needs labels; embedded: that
    in any case, for a server whose model can write and no more."""
    false_discovery_rate: float = 0.05
    """Embedded method: level of the Benjamini-Hochberg procedure."""
    min_documents: int = 3
    """Embedded method: features active on fewer anchor documents are not tested."""
    relevant_label: Literal["Yes", "Probably", "Maybe"] = "Maybe"
    """LLM method: lowest label that counts as relevant (paper: Maybe)."""
    passes: int = 2
    """LLM method: how often each feature is judged, each time with its spans in another order (paper: once). The least
    sure label counts, and how far the passes agree is reported. Each pass costs a request a feature; 1 halves the cost
    and leaves agreement unknown."""

    def __post_init__(self) -> None:
        check(self.passes >= 1, f"judge.passes is {self.passes}; it must be at least 1")


@dataclass(frozen=True)
class CoverageConfig:
    """Set arithmetic over scans."""

    anchor: str = "anchor"
    """Data set that defines what could be covered (paper: HH-RLHF + HelpSteer2)."""
    seed: str = "seed"
    """Data set whose gaps are sought (paper: a 10% subset)."""
    threshold: float = 1.0
    """A feature is active on a sample when its peak exceeds this, strictly (paper: default 0.0, best in [1, 2])."""
    sweep: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """Thresholds that the report shows side by side."""
    length_match_draws: int = 20
    """Seeded subsamples of the longer set for the length-matched figure."""
    bootstrap_draws: int = 200
    """Seeded resamples of the seed set's documents for the interval around its coverage."""


@dataclass(frozen=True)
class DiversityConfig:
    """Metrics of diversity that others report, beside coverage."""

    embedding_model: str | None = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence encoder of the metrics of embeddings: a BERT in the layout of sentence-transformers (hub id, folder, or
    pkg://PACKAGE/FOLDER inside an installed package); null leaves them out."""
    embedded_tokens: int = 24_576
    """Rows are embedded, in a random order, until they have this many tokens; so many of the reference as well."""
    pos_model: str | None = "en_core_web_sm"
    """spaCy model (a package's name, or a folder) of the metrics of syntax, in the language of the texts; null leaves
    them out."""
    parsed_words: int = 40_000
    """Rows are tagged and parsed, in a random order, until they have this many words."""
    reference: str | None = None
    """Data set whose clusters are counted and whose density weighs distances in NovelSum; by default
    coverage.anchor."""
    clusters: int = 100
    """Clusters of the reference (code of arXiv 2502.17184: 100)."""
    pair_rows: int = 2_000
    """NovelSum, whose cost is quadratic: rows that are compared, at most."""

    def __post_init__(self) -> None:
        least = {"embedded_tokens": 512, "parsed_words": 1, "clusters": 2, "pair_rows": 2}
        for name, floor in least.items():
            check(
                getattr(self, name) >= floor, f"diversity.{name} is {getattr(self, name)}; it must be at least {floor}"
            )


@dataclass(frozen=True)
class SynthesizeConfig:
    """Missing features to new samples."""

    max_features: int | None = None
    """Missing features that are written for, those with the highest anchor peaks first; by default all."""
    candidates: int = 4
    """Step 1: candidates per missing feature and attempt."""
    attempts: int = 1
    """Step 1: attempts at most, each for the features that no candidate has activated yet; those left are exhausted."""
    second_step: int = 4
    """Step 2: candidates per missing feature, from its contrastive pair."""
    keep_per_feature: int = 1
    """Samples kept per feature, best activation first."""
    temperature: float = 0.8
    """Sampling temperature (paper: 0.8)."""
    top_p: float = 0.9
    """Nucleus (paper: 0.9)."""
    max_new_tokens: int = 900
    """Tokens a candidate may take (paper: 900)."""
    steer: tuple[float, ...] = ()
    """Embedded writer only: strengths that candidates take in turn, as multiples of the feature's anchor peak. So much
    of its direction is added while the text is written (0: none); later attempts go higher, or lower where what was
    written is no sample. Empty: by prompting alone."""

    def __post_init__(self) -> None:
        check(
            all(math.isfinite(strength) and strength >= 0 for strength in self.steer),
            f"synthesize.steer is {self.steer}; strengths must be 0 or more",
        )
        least = {"candidates": 1, "attempts": 1, "second_step": 0, "keep_per_feature": 1, "max_new_tokens": 8}
        for name, floor in least.items():
            check(
                getattr(self, name) >= floor, f"synthesize.{name} is {getattr(self, name)}; it must be at least {floor}"
            )
        check(
            self.max_features is None or self.max_features >= 1,
            f"synthesize.max_features is {self.max_features}; it must be at least 1, or absent for all",
        )
        check(self.temperature >= 0, f"synthesize.temperature is {self.temperature}; it must not be negative")
        check(0 < self.top_p <= 1, f"synthesize.top_p is {self.top_p}; it must lie in (0, 1]")


@dataclass(frozen=True)
class ArmConfig:
    """One arm of an ablation: what differs from the run's own settings; what is absent does not."""

    target: Literal["missing", "random missing", "random relevant", "random"] = "missing"
    """Features that are written for: those missing, highest anchor peaks first; as many at random of those missing, of
    the relevant ones that the anchor activates, or of all that it activates (the last two: the paper's controls)."""
    max_features: int | None = None
    """synthesize.max_features."""
    feature_ratio: float | None = None
    """This share of the missing features is written for, instead of max_features (paper: 30, 60 and 100%). At random, a
    seed's smaller shares lie in its larger ones."""
    candidates: int | None = None
    """synthesize.candidates."""
    attempts: int | None = None
    """synthesize.attempts."""
    second_step: int | None = None
    """synthesize.second_step."""
    keep_per_feature: int | None = None
    """synthesize.keep_per_feature."""
    temperature: float | None = None
    """synthesize.temperature."""
    steer: tuple[float, ...] | None = None
    """synthesize.steer. Where an arm has it, every arm's fluency is measured."""
    threshold: float | None = None
    """coverage.threshold: also of what is missing, and so of what is written for."""
    samples: str | None = None
    """Nothing is written: the samples are the lines of this file (as in synthesis/kept.jsonl of a run with another
    model: transfer)."""

    def __post_init__(self) -> None:
        ratio = self.feature_ratio
        check(ratio is None or 0 < ratio <= 1, f"feature_ratio is {ratio}; it must lie in (0, 1]")
        check(
            ratio is None or self.max_features is None,
            f"an arm has both feature_ratio {ratio} and max_features {self.max_features}; keep one",
        )

    @property
    def synthesis(self) -> dict[str, Any]:
        """Settings of `synthesize` that the arm changes."""
        named = (item.name for item in fields(SynthesizeConfig) if hasattr(self, item.name))
        return {name: value for name in named if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class AblationConfig:
    """Synthesis with one thing changed at a time, side by side: `fac ablate`."""

    name: str = "ablation"
    """Names the product, ablations/NAME."""
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    """What is compared, by name."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each arm is run once with each, in place of run.seed; intervals are over them."""

    def __post_init__(self) -> None:
        for what, name in (("ablation.name", self.name), *(("an arm's name", arm) for arm in self.arms)):
            plain = bool(name.strip()) and not name.startswith(".") and not set(name) & set("/\\")
            check(
                plain,
                f"{what} is {name!r}; it names a folder, so it must not be empty, begin with a dot or hold / or \\",
            )
        check(
            bool(self.seeds) and len(set(self.seeds)) == len(self.seeds),
            f"ablation.seeds is {list(self.seeds)}; name one seed or more, none twice",
        )


@dataclass(frozen=True)
class SelectConfig:
    """Existing documents that cover what the seed lacks."""

    source: str | None = None
    """Data set to pick from, which has to be scanned; by default coverage.anchor. --select.from is short for it."""
    target: Literal["missing", "relevant", "all"] = "missing"
    """Features to cover: those missing from the seed, all that are relevant to the task, or every one of the SAE."""
    method: Literal["greedy", "magnitude", "greed_select", "sim_scale", "random"] = "greedy"
    """greedy: most features not covered yet, within 1 - 1/e of the best; magnitude: the same for the height of their
    peaks; greed_select, sim_scale: rivals of arXiv 2502.14050, which look at every feature; random: the control."""
    budget: int | None = None
    """Documents, or tokens, that are taken at most; by default as many as add something."""
    cost: Literal["documents", "tokens"] = "documents"
    """What the budget counts: documents, or their content tokens (greedy then guarantees (1 - 1/e) / 2)."""
    similarity: float = 0.8
    """sim_scale: a document is left out when this share of its features, or more, is active on those taken before."""

    def __post_init__(self) -> None:
        check(
            self.budget is None or self.budget >= 1,
            f"select.budget is {self.budget}; it must be at least 1 of select.cost ({self.cost}), or absent for as "
            "many as add something",
        )
        check(0 < self.similarity <= 1, f"select.similarity is {self.similarity}; it must lie in (0, 1]")


Matrix = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685)."""

    rank: int = 8
    """Rank of what is added to each matrix (paper: 8 for toxicity and instructions, 16 for rewards)."""
    alpha: float = 16.0
    """What is added is scaled by alpha / rank (paper: 16; 32 for rewards)."""
    dropout: float = 0.1
    """Share of the adapters' inputs that is dropped in training (paper: 0.1)."""
    matrices: tuple[Matrix, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Matrices that are adapted (paper: all seven)."""

    def __post_init__(self) -> None:
        check(self.rank >= 1, f"lora.rank is {self.rank}; it must be at least 1")
        check(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; it must lie in [0, 1)")
        check(
            bool(self.matrices) and len(set(self.matrices)) == len(self.matrices),
            f"lora.matrices is {list(self.matrices)}; name one or more, none twice",
        )


@dataclass(frozen=True)
class FinetuneConfig:
    """Does it help? A classifier, a reward or an instruction model, by the task: seed against seed + synthetic."""

    train: str | None = None
    """Data set of the seed's preference pairs (reward), or instructions with answers: RewardBench's, HH-RLHF's, TRL's,
    AlpacaEval's or Alpaca's rows, or fields named below. Its max_tokens keep the end of a pair's texts (paper: 1,024),
    or the start of instruction and answer. None: of such a task nothing is trained."""
    heldout: str = "heldout"
    """Data set that is never trained on: labelled documents; or pairs (paper: RewardBench), or instructions with
    answers."""
    prompt: str | None = None
    """Pairs, instructions: field with what is answered, as text or as messages, where rows are in no published format.
    None: rows with `answer` are answers to nothing."""
    answer: str | None = None
    """Pairs, instructions: field with the answer, of a pair the better one, where rows are in no published format."""
    rejected: str | None = None
    """Pairs: field with the worse answer."""
    outputs_for: str | None = None
    """Data set of instructions that each arm answers, into model_outputs.json as AlpacaEval reads it; with llm.url the
    local pairwise judge compares them (paper: AlpacaEval's 805)."""
    output_tokens: int = 256
    """Tokens of such an answer at most."""
    method: Literal["head", "lora"] = "head"
    """head: a linear head on residuals of a backbone that stays as it is (seconds): the mean of the content tokens, of
    an answer its last token behind the final norm. lora: adapters in the backbone, and a head on the last token but for
    instructions, which have none. Paper, lora: classifier 3 epochs, rate 5e-5, batch 16; reward 1, 8e-5, 8;
    instructions 5, 1e-4, 16."""
    seeds: tuple[int, ...] = (42, 43, 44)
    """Seeds (paper: 42, 43, 44)."""
    epochs: int = 15
    """Passes over the training set (paper, head only: classifier 15, reward 5)."""
    learning_rate: float = 8e-5
    """Adam's rate (paper, head only: 8e-5)."""
    batch: int = 4
    """Samples in a step (paper, head only: 4)."""
    lora: LoraConfig = LoraConfig()
    """Adapters of the backbone's matrices."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """LoRA: after warm-up constant, or falling to 0 at the last step (paper: cosine for rewards)."""
    warmup: float = 0.0
    """LoRA: share of the steps over which the rate rises linearly from 0 (paper: 0.1 for rewards)."""
    weight_decay: float = 0.0
    """LoRA: AdamW's, of adapters and head (paper: 0.01 for rewards)."""
    gradient_clip: float = 1.0
    """LoRA: norm that a step's gradient is cut to, as transformers' trainer does."""
    checkpoint_every: int = 100
    """LoRA: steps between checkpoints."""

    def __post_init__(self) -> None:
        check(
            self.answer is not None or self.rejected is None,
            f"finetune.rejected is {self.rejected!r} without finetune.answer: name the better one too",
        )
        check(self.output_tokens >= 1, f"finetune.output_tokens is {self.output_tokens}; it must be at least 1")


StudyArm = Literal[
    "random generations",
    "random features",
    "one step",
    "two steps",
    "selection",
    "self-instruct",
    "evol-instruct",
]


@dataclass(frozen=True)
class StudyConfig:
    """Does coverage help? Ways to add samples to the seed, by what a classifier trained on them detects."""

    budgets: tuple[int, ...] = ()
    """Samples that each arm adds to the seed, such as 25 50 100 200; none: no study. What is written, and how, is as in
    `synthesize`."""
    arms: tuple[StudyArm, ...] = typing.get_args(StudyArm)
    """What is compared, beside the seed alone. one step and two steps write for what is missing, from the same number
    of tries; random generations are one step's, unfiltered; random features are the paper's control; selection takes
    documents of the anchor; the last two are rivals that look at no feature."""
    seeds: tuple[int, ...] = (42, 43, 44, 45, 46)
    """Each trains once: its initialisation and order, and which samples a budget draws where an arm has no order."""
    pools: int = 1
    """How often all samples are written anew; seeds take the pools in turn."""
    lora_budgets: tuple[int, ...] = ()
    """Budgets at which adapters are trained beside heads: a head takes seconds, adapters minutes on a CPU."""
    lora_seeds: tuple[int, ...] = (42, 43, 44)
    """Seeds with which they are trained."""
    lora_steps: int = 225
    """Steps of adapters, about as many in every cell (whole epochs), so that more documents do not mean more training
    (paper: 3 epochs of 1,200 documents). All else of heads and adapters is as in `finetune`."""
    lora_learning_rate: float = 5e-5
    """AdamW's rate for adapters (paper: 5e-5)."""
    lora_batch: int = 16
    """Samples in a step of adapters (paper: 16)."""

    def __post_init__(self) -> None:
        check(all(budget >= 1 for budget in self.budgets), f"study.budgets is {list(self.budgets)}; each at least 1")
        for name in ("budgets", "arms", "seeds", "lora_budgets", "lora_seeds"):
            values = getattr(self, name)
            check(len(set(values)) == len(values), f"study.{name} is {list(values)}; name none twice")
        check(bool(self.arms and self.seeds), "study.arms and study.seeds may not be empty")
        check(self.pools >= 1, f"study.pools is {self.pools}; it must be at least 1")
        check(
            set(self.lora_budgets) <= {0, *self.budgets} and set(self.lora_seeds) <= set(self.seeds),
            f"study.lora_budgets is {list(self.lora_budgets)} of study.budgets {list(self.budgets)}, study.lora_seeds "
            f"{list(self.lora_seeds)} of study.seeds {list(self.seeds)}; name only what is there",
        )
        for name in ("lora_steps", "lora_batch"):
            check(getattr(self, name) >= 1, f"study.{name} is {getattr(self, name)}; it must be at least 1")
        rate = self.lora_learning_rate
        check(0 < rate < math.inf, f"study.lora_learning_rate is {rate}; it must be above 0 and finite")


@dataclass(frozen=True)
class SteerConfig:
    """Samples with two choices to a steering vector, measured on questions that none of them is made of."""

    heldout: str | None = None
    """File, glob or pkg://PACKAGE/GLOB of the questions: a list or lines of JSON, each with a question and its choices
    (A) and (B) as the model-written evaluations print them. None: nothing is measured."""
    question: str = "question"
    """Field with the question and its choices."""
    matching: str = "answer_matching_behavior"
    """Field with the choice that shows the behaviour, such as (A)."""
    limit: int | None = None
    """Questions at most, chosen by hash of their text."""
    layer: int | None = None
    """Blocks applied before the vector is taken and added; by default backbone.layer (paper: 12 of 32)."""
    multipliers: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    """How much of the vector is added; -1, 0 and 1 must be among them (paper: -1 to 1)."""
    seeds: tuple[int, ...] = (42, 43, 44)
    """Each decides which choice of a sample is (A) when the vector is taken."""
    equal_norm_with: tuple[str, ...] = ()
    """Run directories of other behaviours, kept for the same model: the vector gets the mean norm of all of them, and
    the other arms' vectors too. Empty: each keeps its own (paper: all behaviours of a layer)."""

    def __post_init__(self) -> None:
        check(
            {-1.0, 0.0, 1.0} <= set(self.multipliers),
            f"steer.multipliers is {list(self.multipliers)}; -1, 0 and 1 must be among them",
        )
        check(self.layer is None or self.layer >= 1, f"steer.layer is {self.layer}; it counts blocks applied, from 1")
        check(self.limit is None or self.limit >= 1, f"steer.limit is {self.limit}; it must be at least 1")
        check(bool(self.seeds), "steer.seeds is empty; name one seed at least")


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


@dataclass(frozen=True)
class Config:
    """Everything a run is made from."""

    run: RunConfig = RunConfig()
    mesh: MeshConfig = MeshConfig()
    backbone: BackboneConfig = BackboneConfig()
    data: dict[str, DataSet] = field(default_factory=dict)
    """Data sets by name."""
    harvest: HarvestConfig = HarvestConfig()
    sae: SaeConfig = SaeConfig()
    train: TrainConfig = TrainConfig()
    sweep: SweepConfig = SweepConfig()
    splice: SpliceConfig = SpliceConfig()
    scan: ScanConfig = ScanConfig()
    explain: ExplainConfig = ExplainConfig()
    judge: JudgeConfig = JudgeConfig()
    coverage: CoverageConfig = CoverageConfig()
    diversity: DiversityConfig = DiversityConfig()
    synthesize: SynthesizeConfig = SynthesizeConfig()
    ablation: AblationConfig = AblationConfig()
    select: SelectConfig = SelectConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    study: StudyConfig = StudyConfig()
    steer: SteerConfig = SteerConfig()
    llm: LlmConfig = LlmConfig()
    sidecar: SidecarConfig = SidecarConfig()

    def __post_init__(self) -> None:
        steered = {"synthesize.steer": self.synthesize.steer}
        steered |= {f"ablation.arms.{name}.steer": arm.steer or () for name, arm in self.ablation.arms.items()}
        for name, strengths in steered.items():
            check(
                not strengths or self.llm.url is None,
                f"{name} is {strengths} and llm.url {self.llm.url}: only the embedded writer can be steered; leave out "
                f"{name}, or set llm.url to null",
            )

    @property
    def harvested_layers(self) -> tuple[int, ...]:
        """The layers that a harvest keeps, rising."""
        return tuple(sorted({self.backbone.layer, *self.harvest.layers}))

    def method_of(self, stage: ExplainConfig | JudgeConfig) -> Literal["embedded", "llm"]:
        """Whether a server explains or judges, as that part of the config (`explain` or `judge`) has it."""
        return "embedded" if self.llm.url is None or stage.method == "embedded" else "llm"

    def dataset(self, name: str) -> DataSet:
        """The data set called `name`, or an error that lists the names there are."""
        if name not in self.data:
            hint = suggest(name, self.data)
            raise UserError(
                f"no data set is called {name!r} under data:{hint}; there are: {', '.join(self.data) or 'none'}"
            )
        return self.data[name]


def load_config(path: str | Path) -> Config:
    """Read a YAML file strictly; a file that it names under `base` (beside it) gives what it does not say itself.

    Raises UserError for a missing file, bad YAML, an unknown key, a wrong type, or files that are each other's base.
    """
    return from_plain(Config, _read(Path(path), ()), str(path))


def to_yaml(config: Config) -> str:
    """The resolved config; `load_config` of it gives the same config back."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A file over its base, as plain values; `above` are the files that led to it."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = f"base of {above[-1]}" if above else "configs/quickstart.yaml is one to start from"
        raise UserError(f"config {path} does not exist; {hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"config {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"config {path} cannot be read ({error.strerror}); name a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"config {path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict) or "base" not in raw:
        return raw or {}
    base = raw.pop("base")
    check(isinstance(base, str), f"config {path}: base is {base!r}; it must be the path of a YAML file, from this one")
    here = path.resolve()
    if here in above:
        raise UserError(f"config {path} is its own base, by way of {' and '.join(map(str, above))}; take one base out")
    under = _read(path.parent / base, (*above, here))
    from_plain(Config, under, str(path.parent / base))  # what is wrong with the base is said of the base
    return _over(under, raw)


def _over(under: Any, above: Any) -> Any:
    """Mappings joined key by key; of anything else, what stands above."""
    if not (isinstance(under, dict) and isinstance(above, dict)):
        return above
    return under | {key: _over(under.get(key), value) for key, value in above.items()}
