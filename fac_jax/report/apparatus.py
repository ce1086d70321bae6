"""How the findings were made, as sections of the page: what was run, training, methods, limits, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fac_jax.config.data import DataSet, Source
from fac_jax.config.file import to_yaml
from fac_jax.config.sae import TrainConfig
from fac_jax.report.blocks import Section, absent, chip, entry, facts, numbers, table, texts, veil
from fac_jax.report.figures import Series, bar_figure, line_figure, number
from fac_jax.report.markup import Html, join, tag
from fac_jax.report.products import Row, RunView
from fac_jax.sae.metrics import DENSITY_EDGES

KINDS = {"topk": "Top-K", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU", "matryoshka": "Matryoshka"}
"""Kinds of autoencoder, as one reads them."""

QUALITY = {
    "fvu": ("FVU", "share of the variance that is not reconstructed, over the whole held-out set, centred"),
    "normalised_loss": (
        "Normalised loss",
        "squared error over squared norm, mean over tokens: the paper's figure",
    ),
    "l0": ("L0", "active features per token"),
    "cosine": ("Cosine", "of a residual and its reconstruction, mean over tokens"),
    "dense_fraction": ("Dense", "share of features that are active on more than a tenth of the rows"),
    "dead_fraction": ("Dead", "share of features that are active on no held-out row"),
    "rows": ("Rows", "measured"),
    "rows_left_out": ("Rows left out", "norm beyond the filter of training"),
}
"""Held-out metrics of an autoencoder: name and meaning."""

SPLICED = {
    "ce_clean": ("Cross entropy, clean", "nats per predicted token, of the language model as it is"),
    "ce_spliced": ("Cross entropy, spliced", "the residual of the user's tokens replaced by its reconstruction"),
    "ce_zero": ("Cross entropy, zero", "that residual replaced by zero"),
    "ce_mean": ("Cross entropy, mean", "that residual replaced by its mean over the training rows"),
    "loss_recovered": ("Loss recovered", "share of what zero ablation costs that the reconstruction saves"),
    "loss_recovered_mean": ("Loss recovered, mean", "the same against mean ablation"),
    "kl": ("KL divergence", "nats from the clean to the spliced prediction"),
}
"""Losses of the language model with the autoencoder spliced in: name and meaning."""

METHODS = {
    ("explanations", "embedded"): (
        "tokens over-represented where a feature peaks (log-odds with an informative prior), and tokens that its "
        "direction promotes (logit lens)"
    ),
    ("explanations", "llm"): "{server} explains the top passages; a second call checks the explanation against them",
    ("relevance", "embedded"): (
        "peaks are higher on positive anchor documents: one-sided rank test, Benjamini-Hochberg at {level:.0%}. "
        "Association, not meaning: a feature of style or length can pass"
    ),
    ("relevance", "llm"): "{server} judges each explanation by the task's rubric; relevant from “{label}” on",
    ("synthesis", "embedded"): (
        "the language model under study writes, in two steps: candidates from explanations, then from contrastive "
        "pairs; kept only when the autoencoder confirms the activation"
    ),
    ("synthesis", "llm"): (
        "{server} writes, in two steps: candidates from explanations, then from contrastive pairs; kept only when the "
        "autoencoder confirms the activation"
    ),
}
"""What a stage does, by stage and kind of method."""

LIMITS = (
    "Coverage counts the features of one autoencoder at one layer. Another autoencoder, layer or threshold has other "
    "features: compare numbers only within a run.",
    "Longer text activates more features: read the columns of equal length before concluding that a set is more "
    "diverse.",
    "A feature is missing relative to this anchor: what the anchor lacks cannot be missed.",
)
ASSOCIATION = (
    "Relevance was decided by association with the anchor's labels. Where topic, source or length go with the labels, "
    "features of topic, source or length pass for relevant."
)
OWN_WRITING = (
    "The samples were written by the model under study. A small model writes clumsy text and may not follow its "
    "prompt: the filter checks activation, not quality or label."
)
FEW_DOCUMENTS = (
    "The classifier was measured on {n:,} documents. The standard deviation over seeds leaves the sampling of these "
    "out; the bootstrap interval of a difference does not."
)
LICENCES = (
    "Passages belong to the data sets listed under “Data sources” and stay under their licences; synthetic samples "
    "are subject to the licence of the model that wrote them. Many are harmful by design: they serve to train "
    "detectors, and are shown so that the method can be checked."
)


def what_was_run(view: RunView) -> Section:
    """Model, layer, autoencoder and data sets, and the size of each."""
    config = view.config
    rows: list[list[Any]] = [
        ["Language model", tag("code", config.backbone.model)],
        ["Residual stream", f"after {config.backbone.layer} blocks (hidden_states[{config.backbone.layer}])"],
        *_store(view.summary("activations"), config.train),
        *_autoencoder(view.sae),
    ]
    made = "activations" in view.records or config.train.store is not None or config.train.activations == "live"
    body = join(
        table(texts("What", "Value"), rows),
        None if made else absent("An activation store", "fac harvest CONFIG"),
        _scans(view),
        tag("details", tag("summary", "Data sources"), _sources(config.data)),
    )
    return Section("run", "Run", "What was run", body)


def _store(store: Row, train: TrainConfig) -> list[list[Any]]:
    if train.activations == "live":
        return [["Activation store", "none: the autoencoder was trained on rows as the language model computed them"]]
    if train.store is not None:
        return [["Activation store", tag("code", train.store)]]
    if not store:
        return []
    heldout = f"{store['validation_rows']:,} rows ({store['validation_rows'] / store['rows']:.1%}), split by document"
    return [
        ["Activation store", f"{store['rows']:,} rows of {store['documents']:,} documents, {_bytes(store['bytes'])}"],
        ["Held out of training", heldout],
        ["Median norm of a row", number(store["median_norm"])],
        ["Computed tokens that are real", f"{store['packing_efficiency']:.1%}"],
        ["Harvest", f"{store['tokens_per_second']:,.0f} tokens/s"],
    ]


def _autoencoder(sae: Row | None) -> list[list[Any]]:
    if sae is None:
        return []
    kind = KINDS.get(sae["variant"], sae["variant"])
    ties = "untied" if "W_enc" in sae["tensors"] else "tied"
    active = "a threshold each" if sae["k"] is None else f"K = {sae['k']}"
    shape = f"{ties} {kind}, {sae['features']:,} features, {active}, width {sae['d_model']:,}"
    return [["Sparse autoencoder", shape], ["Trained on", f"{sae['rows']:,} rows in {sae['steps']:,} steps"]]


def _scans(view: RunView) -> Html:
    if not view.scans:
        return absent("A scan", "fac scan CONFIG")
    order = [view.config.coverage.anchor, view.config.coverage.seed, "random", "kept"]
    names = sorted(view.scans, key=lambda name: (order.index(name) if name in order else len(order), name))
    keys = ("documents", "tokens", "content_tokens", "active_features", "skipped_rows")
    rows = [[name, *(f"{view.scans[name]['counts'][key]:,}" for key in keys)] for name in names]
    columns = numbers("Documents", "Tokens", "User's own", "Active features", "Rows skipped")
    return table([*texts("Data set scanned"), *columns], rows)


def _sources(data: Mapping[str, DataSet]) -> Html:
    rows = [
        [name, tag("code", source.path), _label(source), _taken(dataset, source)]
        for name, dataset in data.items()
        for source in dataset.sources
    ]
    return table(texts("Data set", "Files", "Label", "Taken"), rows)


def _label(source: Source) -> str:
    if source.label is not None:
        return f"field {source.label}"
    return "none" if source.constant_label is None else f"all {source.constant_label:g}"


def _taken(dataset: DataSet, source: Source) -> str:
    low, high = source.split
    parts = [
        f"hash in [{low:g}, {high:g})" if (low, high) != (0, 1) else "",
        f"first {source.limit:,}" if source.limit is not None else "",
        f"{dataset.sample:.0%} sample" if dataset.sample < 1 else "",
    ]
    return ", ".join(filter(None, parts)) or "all"


def training(view: RunView) -> Section:
    """The autoencoder's curves, its quality on held-out rows, and what the language model loses with it."""
    title, short = "Training the autoencoder", "Training"
    if view.sae is None:
        lacks = absent("A trained autoencoder", "fac train CONFIG")
        return Section("training", short, title, join(lacks, _spliced(view.splice)))

    def curve(key: str, colour: int) -> list[Series]:
        return [Series(key, [(line["step"], line[key]) for line in view.curve if line.get(key) is not None], colour)]

    figures = [
        line_figure("Normalised loss", curve("loss", 3), "step"),
        line_figure("FVU", curve("fvu", 2), "step"),
        line_figure("K", curve("k", 1), "step", from_zero=True),
        line_figure("Dead features", curve("dead_features", 0), "step", from_zero=True),
    ]
    rows = [[*QUALITY.get(key, (key, "")), number(value)] for key, value in view.sae["metrics"].items()]
    columns = [*texts("On held-out rows", "Meaning"), *numbers("Value")]
    figures += _density(view.sae)
    body = join(tag("div", figures, class_="figures"), table(columns, rows), _spliced(view.splice))
    return Section("training", short, title, body)


def _density(sae: Row) -> list[Html]:
    """How many features are active on which share of the held-out rows."""
    counts = sae.get("density") or []
    if not counts:
        return []
    powers = [f"{edge:.0e}".replace("e-0", "e-") for edge in DENSITY_EDGES]
    names = [f"< {powers[0]}", *(f"≥ {power}" for power in powers)]
    shares = [(place, count / sae["features"]) for place, count in enumerate(counts)]
    return [
        bar_figure("Features by activation density", names, [Series("share of features", shares, 2)], "share of rows")
    ]


def _spliced(found: Row | None) -> Html | None:
    """Losses with the autoencoder in the language model, and two answers to look at."""
    if found is None:
        return None
    caption = (
        f"The autoencoder inside the language model: {found['tokens']:,} predictions in {found['documents']:,} "
        "held-out documents"
    )
    rows = [[*said, "–" if found[key] is None else number(found[key])] for key, said in SPLICED.items()]
    sample = found["sample"]
    side = facts("temperature 0", "a sample, not a measurement")
    answers = [
        tag("p", tag("span", f"{name.capitalize()}: ", class_="quiet"), veil(sample[name]))
        for name in ("prompt", "clean", "spliced")
    ]
    summary = tag("summary", "One answer of the language model, with and without the autoencoder")
    return join(
        table([*texts("Figure", "Meaning"), *numbers("Value")], rows, caption),
        tag("details", summary, entry("Sample", side, answers)),
    )


def methods(view: RunView) -> Section:
    """Which kind of method each stage used, and what it did."""
    acts = (
        "top-k, as in the paper's formula" if view.config.scan.acts == "topk" else "ReLU alone, as in the paper's code"
    )
    rows: list[list[Any]] = [
        ["Activations", chip("measured"), f"residuals, and activations of the autoencoder ({acts})"]
    ]
    for stage, kind in _kinds(view).items():
        said = METHODS[stage, kind].format(
            server=f"{view.config.llm.model or 'the first model'} at {view.config.llm.url}",
            level=view.config.judge.false_discovery_rate,
            label=view.config.judge.relevant_label,
        )
        rows.append([stage.capitalize(), chip("LLM" if kind == "llm" else kind, embedded=kind == "embedded"), said])
    if view.finetune is not None:
        rows.append(["Classifier", chip("measured"), "logistic regression on frozen features, same seeds for each arm"])
    body = join(
        tag("p", "Stages marked “embedded” ask no language model for a judgement, and can do less than one would."),
        table(texts("Stage", "Method", "What it does"), rows),
    )
    return Section("methods", "Methods", "Methods", body)


def _kinds(view: RunView) -> dict[str, str]:
    """`embedded` or `llm` for each stage that has run and may be either."""
    found = {stage: view.summary(stage).get("method") for stage in ("explanations", "relevance")}
    found["synthesis"] = None if view.synthesis is None else "embedded" if view.config.llm.url is None else "llm"
    return {stage: kind for stage, kind in found.items() if kind is not None}


def limits(view: RunView) -> Section:
    """What the numbers do not say, and whose the texts are."""
    kinds = _kinds(view)
    notes = [
        *LIMITS,
        ASSOCIATION if kinds.get("relevance") == "embedded" else None,
        OWN_WRITING if kinds.get("synthesis") == "embedded" else None,
        FEW_DOCUMENTS.format(n=view.finetune["heldout"]["documents"]) if view.finetune is not None else None,
    ]
    body = join(tag("ul", [tag("li", note) for note in notes if note]), tag("p", LICENCES))
    return Section("limits", "Limits", "Limits and licences", body)


def provenance(view: RunView) -> Section:
    """Each product with its digest, date and duration; versions; the resolved config."""
    title = "Provenance"
    if not view.records:
        return Section("provenance", title, title, absent("Any product", "fac run CONFIG"))
    records = sorted(view.records.items(), key=lambda item: item[1].finished)
    rows: list[list[Any]] = [[name, tag("code", r.digest), r.finished, f"{r.seconds:,.1f}"] for name, r in records]
    rows.append(["All", "", "", f"{sum(record.seconds for _, record in records):,.1f}"])
    versions = ", ".join(f"{package} {version}" for package, version in records[-1][1].versions.items())
    body = join(
        table([*texts("Product", "Digest", "Finished"), *numbers("Seconds")], rows),
        tag("p", f"Made with {versions}.", class_="quiet small"),
        tag("details", tag("summary", "Resolved config"), tag("pre", to_yaml(view.config), tabindex=0)),
    )
    return Section("provenance", title, title, body)


def _bytes(size: float) -> str:
    if size < 1000:
        return f"{size:,.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:,.1f} {unit}"
    return f"{size / 1000:,.1f} TB"
