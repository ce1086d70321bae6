"""Features to text (paper, section on interpreting features), and how well the text tells where they are active.

Reads the anchor's scan and the SAE; with the embedded method the whole backbone too, else a server. Writes
`explanations.parquet`, one row per feature that is active on the anchor, `scored_spans.parquet`, one row per held-out
span that an explanation was scored by, and `replies.jsonl` where a model was asked.

status: `explained`; `cannot tell` (no token stands out, or the model says so: an honest answer, and not a failure);
`failed` (the reply could not be read; it is kept, and the feature stays without explanation); `left out` (by
`explain.features`: nobody was asked).

Scores are empty for features that have no explanation or next to no held-out documents (`scores/heldout.py`), and for
those that the settings leave out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from fac_jax.backbone.weights import load_backbone, load_tokenizer
from fac_jax.config.file import Config
from fac_jax.features.ask import ask
from fac_jax.features.embedded import decoded, named_tokens, promotes, token_counts, wording
from fac_jax.features.scores.generation import Generated, score_generated
from fac_jax.features.scores.rating import requests_each
from fac_jax.features.scores.score import KINDS, Scores, drawn, score_embedded, score_with
from fac_jax.features.spans import Passages, explaining_spans, read_passages
from fac_jax.features.task import Task, load_task
from fac_jax.llm.client import Generator
from fac_jax.llm.generator import open_generator
from fac_jax.llm.question import label_schema, object_schema, question
from fac_jax.llm.structured import Answer
from fac_jax.mesh import make_mesh
from fac_jax.runs import writing
from fac_jax.sae.checkpoint import load_sae
from fac_jax.scan.product import Scan, check_sae, load_scan
from fac_jax.scan.scorer import open_scorer

EXPLANATIONS = pa.schema(
    {
        "feature": pa.int32(), "method": pa.string(), "model": pa.string(), "status": pa.string(),
        "explanation": pa.string(), "fires_on": pa.list_(pa.string()), "promotes": pa.list_(pa.string()),
        "verified": pa.string(), "raw": pa.string(), "error": pa.string(),
        **{
            f"{test}_{figure}": pa.float64()
            for test in ("detection", "fuzzing")
            for figure in ("auroc", "low", "high")
        },
        "control_detection_auroc": pa.float64(), "control_fuzzing_auroc": pa.float64(), "unread_ratings": pa.int32(),
        "generation_score": pa.float64(), "generation_any": pa.float64(), "generation_control": pa.float64(),
        "generation_control_any": pa.float64(), "generation_peaks": pa.list_(pa.float32()),
    }
)  # fmt: skip
EXPLAIN = object_schema(
    verdict={"type": "string", "enum": ["explained", "cannot tell"]}, explanation={"type": "string", "maxLength": 400}
)
STATUSES = ("explained", "cannot tell", "failed", "left out")
SERVER_GENERATION_FEATURES = 50
"""Features that texts are written for where a server explains, unless `explain.generation_features` says otherwise."""


def explain(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage: explain every feature that is active on the anchor, and score the explanations.

    Raises UserError when the scan was made with another SAE than the one that is there.
    """
    scan = load_scan(inputs[f"scan:{config.coverage.anchor}"])
    folder, log = Path(config.scan.sae) if config.scan.sae else inputs["sae"], out / "replies.jsonl"
    generator = None
    if config.method_of(config.explain) == "embedded":
        rows, scores, tokenizer = explain_embedded(config, scan, folder)
    else:
        mesh = make_mesh(config.mesh)
        sae = load_sae(folder, mesh, None, config.backbone.layer)
        check_sae(scan, sae.digest)
        generator = open_generator(config, mesh)
        passages, tokenizer = read_passages(scan), load_tokenizer(config.backbone.model)
        rows = explain_with(generator, load_task(config.judge.task), passages, tokenizer, config, log)
        texts, w_fd = _explained(rows), np.asarray(sae.sae.w_fd[...])
        scores = score_with(generator, passages, tokenizer, texts, w_fd, config.explain, config.run.seed, log)
    generated = _generate(config, out, inputs, scan, _explained(rows), tokenizer, generator)
    for row in rows:
        row |= scores.columns.get(row["feature"], {}) | generated.columns.get(row["feature"], {})
    for name, table in (
        ("explanations", pa.Table.from_pylist(rows, EXPLANATIONS)),
        ("scored_spans", scores.spans),
    ):
        with writing(out / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary)
    return {**_summary(rows), **scores.summary, **({"generation": generated.summary} if generated.columns else {})}


def explain_embedded(
    config: Config, scan: Scan, sae_folder: Path
) -> tuple[list[dict[str, Any]], Scores, PreTrainedTokenizerFast]:
    """Rows by over-represented tokens and logit lens, their scores by simulation, and the backbone's tokenizer."""
    mesh = make_mesh(config.mesh)
    loaded = load_backbone(config.backbone.model, None, config.backbone.dtype, mesh)
    sae = load_sae(sae_folder, mesh, loaded.config.d_model, config.backbone.layer)
    check_sae(scan, sae.digest)
    passages = read_passages(scan)
    held_nv = token_counts(passages)
    fires = named_tokens(passages, held_nv, config.explain.tokens)
    promoted = promotes(loaded, sae)
    rows = []
    for feature in active_features(scan):
        named = decoded(fires[feature], loaded.tokenizer), decoded(promoted[feature].tolist(), loaded.tokenizer)
        text = wording(*named)
        rows.append({
            "feature": feature, "method": "embedded", "status": "cannot tell" if text is None else "explained",
            "explanation": text, "fires_on": named[0], "promotes": named[1],
        })  # fmt: skip
    explained = {feature: fires[feature] for feature in _explained(rows)}
    scores = score_embedded(passages, explained, np.asarray(sae.sae.w_fd[...]), config.explain, config.run.seed)
    return rows, scores, loaded.tokenizer


def explain_with(
    generator: Generator,
    task: Task,
    passages: Passages,
    tokenizer: PreTrainedTokenizerFast,
    config: Config,
    log: Path,
) -> list[dict[str, Any]]:
    """Rows by a language model: it explains some spans of each feature, then checks its explanation against them."""
    features = active_features(passages.scan)
    chosen = drawn(features, config.explain.features, config.run.seed)
    shown = explaining_spans(passages, chosen, config.explain, tokenizer)
    asked = {
        f"explain:{feature}": question(task.prompt("explain"), {"spans": items}, EXPLAIN)
        for feature, items in shown.items()
    }
    answers = ask(generator, asked, log, "explain")
    explained = {feature: _explanation(answers[f"explain:{feature}"]) for feature in shown}
    labels = label_schema(task.description.labels)
    checks = {
        f"verify:{feature}": question(task.prompt("verify"), {"explanation": text, "spans": shown[feature]}, labels)
        for feature, text in explained.items()
        if text is not None
    }
    checked = ask(generator, checks, log, "verify")
    rows = {
        feature: _row(feature, text, answers[f"explain:{feature}"], checked.get(f"verify:{feature}"), generator.name)
        for feature, text in explained.items()
    }
    return [rows.get(feature, {"feature": feature, "method": "llm", "status": "left out"}) for feature in features]


def generation_features(config: Config) -> int:
    """Features that texts are written for, to score their explanations."""
    if config.explain.generation_features is not None:
        return config.explain.generation_features
    return 0 if config.method_of(config.explain) == "embedded" else SERVER_GENERATION_FEATURES


def later_requests(config: Config, features: int) -> int:
    """Requests at most, of a server, after the one that explains each of so many features."""
    settings = config.explain
    features = min(features, features if settings.features is None else settings.features)
    scored = min(features, features if settings.scored_features is None else settings.scored_features)
    each = sum(requests_each(kind, settings.scored_spans, settings.scored_spans) for kind in KINDS)
    written = min(features, generation_features(config)) * settings.generation_texts
    return features + each * (scored + min(scored, settings.control_features)) + written


def active_features(scan: Scan) -> list[int]:
    """Features with a peak above 0 on some document."""
    return np.unique(scan.peaks_nf.indices).tolist()


def _explained(rows: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Explanations by feature, of those that have one."""
    return {row["feature"]: row["explanation"] for row in rows if row["status"] == "explained"}


def _generate(
    config: Config,
    out: Path,
    inputs: Mapping[str, Path],
    scan: Scan,
    explanations: Mapping[int, str],
    tokenizer: PreTrainedTokenizerFast,
    generator: Generator | None,
) -> Generated:
    """Texts written from a sample of the explanations, and what they activate."""
    count = generation_features(config)
    sample = {feature: explanations[feature] for feature in drawn(list(explanations), count, config.run.seed)}
    if not sample:
        return Generated({}, {})
    writer = generator or open_generator(config, make_mesh(config.mesh))
    score = open_scorer(config, inputs, scan, scan.identity.name)
    settings = config.explain.generation_texts, config.coverage.threshold, config.run.seed
    return score_generated(writer, sample, score, tokenizer.all_special_tokens, *settings, out / "replies.jsonl")


def _explanation(answer: Answer) -> str | None:
    if answer.value is None or answer.value["verdict"] != "explained":
        return None
    return answer.value["explanation"].strip() or None


def _row(feature: int, text: str | None, answer: Answer, check: Answer | None, model: str) -> dict[str, Any]:
    """`verified` stays empty when the second reply could not be read: an explanation is not assumed to be right."""
    status = "failed" if answer.value is None else "cannot tell" if text is None else "explained"
    return {
        "feature": feature, "method": "llm", "model": model, "status": status, "explanation": text,
        "verified": check.value["label"] if check is not None and check.value is not None else None,
        "raw": answer.raw, "error": answer.error or (check.error if check is not None else None),
    }  # fmt: skip


def _summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    rows = list(rows)
    counts = Counter(row["status"] for row in rows)
    return {
        "method": rows[0]["method"] if rows else None,
        "features": len(rows),
        **{status.replace(" ", "_"): counts[status] for status in STATUSES},
    }
