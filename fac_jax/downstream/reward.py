"""A reward model from preference pairs: does it prefer the better answer of pairs that it never saw?

    loss = softplus(r(worse) - r(better))        Bradley-Terry

r is linear in the last token of prompt and answer behind the final norm. lora: adapters in the backbone and that head;
head: the backbone is frozen, and the head's inputs are standardised with the deviation of the seed's answers. Accuracy
counts the pairs whose better answer scores higher: a tie is not a win. Where held-out rows name RewardBench's subsets,
its sections are scored by its own weights. Of a text longer than its data set's `max_tokens` the end is kept.

Reads pairs (`published.py`) and what synthesis wrote; writes eval.json, predictions.parquet (a row a pair, arm and seed
with both scores) and, of lora, arms/ARM/seed-N/ with the adapters as peft reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx
from jaxtyping import Bool, Float

from fac_jax.backbone.weights import load_backbone
from fac_jax.config.file import Config
from fac_jax.downstream.arms import COMPARED, Arms, read_arms, train_arms
from fac_jax.downstream.encode import Encoded, encode_examples
from fac_jax.downstream.evaluate import bootstrap_mean, spread
from fac_jax.downstream.head import fit_pairs
from fac_jax.downstream.objectives import last_states
from fac_jax.downstream.pieces import Group
from fac_jax.downstream.published import Example
from fac_jax.downstream.rewardbench import missing_and_unknown, overall, section_scores
from fac_jax.downstream.tune import Tuner, make_tuner, of_texts, score_texts
from fac_jax.mesh import make_mesh
from fac_jax.runs import write_text, writing

Scores = Mapping[str, Float[np.ndarray, "s n 2"]]
"""By arm: of every seed and held-out pair the better answer's and the worse answer's."""
PREDICTIONS = pa.schema(
    {
        "arm": pa.string(), "seed": pa.int64(), "pair": pa.string(), "subset": pa.string(), "source": pa.string(),
        "chosen": pa.float32(), "rejected": pa.float32(),
    }
)  # fmt: skip


def reward(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage: train every arm with every seed and score the held-out pairs. Raises UserError as `read_arms` does."""
    settings = config.finetune
    assert settings.train is not None
    arms = read_arms(config, inputs["synthesis"], "pair")
    loaded = load_backbone(config.backbone.model, None, config.backbone.dtype, make_mesh(config.mesh))
    tuner = make_tuner(loaded, "reward", settings, config.backbone)
    longest = {name: config.dataset(name).max_tokens for name in (settings.train, settings.heldout)}
    trained = {
        arm: encode_examples(pairs, loaded.tokenizer, longest[settings.train], "end")
        for arm, pairs in arms.training.items()
    }
    heldout = encode_examples(arms.heldout, loaded.tokenizer, longest[settings.heldout], "end")
    scores = (_tuned if settings.method == "lora" else _headed)(config, out, tuner, trained, heldout.groups)
    evaluation = _evaluation(config, arms, scores, trained, heldout)
    _write_predictions(out / "predictions.parquet", scores, arms.heldout, settings.seeds)
    write_text(out / "eval.json", json.dumps(evaluation, indent=1, allow_nan=False))
    return {
        "pairs": len(arms.heldout),
        "accuracy": {arm: row["accuracy"]["mean"] for arm, row in evaluation["arms"].items()},
    }


def wins(scores: Float[np.ndarray, "*s 2"]) -> Bool[np.ndarray, "*s"]:
    """Where the better answer scores higher; a tie is not a win."""
    return scores[..., 0] > scores[..., 1]


def _tuned(
    config: Config, out: Path, tuner: Tuner, arms: Mapping[str, Encoded], heldout: Sequence[Group]
) -> dict[str, Float[np.ndarray, "s n 2"]]:
    groups = {arm: encoded.groups for arm, encoded in arms.items()}
    found = train_arms(config, out, tuner, groups, lambda arm, seed, learned: score_texts(tuner, learned, heldout))
    return {arm: np.stack(of_seeds) for arm, of_seeds in found.items()}


def _headed(
    config: Config, out: Path, tuner: Tuner, arms: Mapping[str, Encoded], heldout: Sequence[Group]
) -> dict[str, Float[np.ndarray, "s n 2"]]:
    """The same of a head alone; every text passes through the backbone once for each arm that holds it."""
    graph, state = nnx.split(tuner.loaded.model)
    compute = jax.jit(lambda state, piece: last_states(nnx.merge(graph, state), None, piece))

    def features(groups: Sequence[Group]) -> Float[np.ndarray, "n 2 d"]:
        x_md = of_texts(tuner, groups, lambda piece: compute(state, piece))
        return x_md.reshape(len(groups), 2, -1)

    seed_n2d, held_n2d = features(arms["seed"].groups), features(heldout)
    sd_d, known = seed_n2d.std((0, 1)) + 1e-6, len(seed_n2d)
    found = {}
    for arm, encoded in arms.items():  # an arm begins with the seed's pairs
        more = encoded.groups[known:]
        x_n2d = np.concatenate([seed_n2d, features(more)]) if more else seed_n2d
        head_sd = fit_pairs((x_n2d[:, 0] - x_n2d[:, 1]) / sd_d, config.finetune)
        found[arm] = np.einsum("nad,sd->sna", held_n2d / sd_d, head_sd)
    return found


def _evaluation(
    config: Config, arms: Arms, scores: Scores, trained: Mapping[str, Encoded], heldout: Encoded
) -> dict[str, Any]:
    """What eval.json holds: accuracies and sections per arm, differences between arms, how they were made."""
    settings = config.finetune
    subsets = [one.subset for one in arms.heldout]
    named = {one for one in subsets if one is not None}
    missing, unknown = missing_and_unknown(named)
    won = {arm: wins(of_arm) for arm, of_arm in scores.items()}
    return {
        "kind": "reward",
        "heldout": {
            "data": settings.heldout, "pairs": len(arms.heldout), "cut": heldout.cut,
            "subsets": {name: subsets.count(name) for name in sorted(named)},
            "without_subset": subsets.count(None), "missing_subsets": missing, "unknown_subsets": unknown,
        },
        "read": arms.counts,
        "arms": {
            arm: {
                "pairs": len(arms.training[arm]), "added": arms.added(arm), "cut": trained[arm].cut,
                **_arm_row(scores[arm], subsets),
            }
            for arm in scores
        },
        "differences": [
            {"arm": arm, "minus": other, **asdict(bootstrap_mean((won[arm] * 1.0 - won[other]).mean(0)))}
            for arm, other in COMPARED
        ],
        "training": training(config),
    }  # fmt: skip


def training(config: Config) -> dict[str, Any]:
    """The settings that a report names."""
    settings = config.finetune
    lora = asdict(settings.lora) if settings.method == "lora" else None
    names = ("method", "epochs", "learning_rate", "learning_rate_schedule", "warmup", "weight_decay", "batch")
    return {**{name: getattr(settings, name) for name in names}, "seeds": list(settings.seeds), "lora": lora}


def _arm_row(scores: Float[np.ndarray, "s n 2"], subsets: Sequence[str | None]) -> dict[str, Any]:
    """Accuracies over seeds; the interval is over held-out pairs, of their mean over seeds."""
    won_sn = wins(scores)
    ties = (scores[..., 0] == scores[..., 1]).sum(1)
    places = {name: np.array([one == name for one in subsets]) for name in sorted({one for one in subsets if one})}
    by_seed = [{name: float(won_n[there].mean()) for name, there in places.items()} for won_n in won_sn]
    sections = [section_scores(one) for one in by_seed]
    total = [score for one in by_seed if (score := overall(one)) is not None]
    return {
        "accuracy": asdict(spread([float(won_n.mean()) for won_n in won_sn])),
        "interval": asdict(bootstrap_mean(won_sn.mean(0))),
        "ties": ties.tolist(),
        "subsets": {name: asdict(spread([one[name] for one in by_seed])) for name in places},
        "sections": {name: asdict(spread([one[name] for one in sections])) for name in sections[0]},
        "score": asdict(spread(total)) if total else None,
    }


def _write_predictions(path: Path, scores: Scores, heldout: Sequence[Example], seeds: Sequence[int]) -> None:
    rows = [
        {
            "arm": arm, "seed": seed, "pair": one.id, "subset": one.subset, "source": one.source,
            "chosen": float(chosen), "rejected": float(rejected),
        }
        for arm, of_seeds in scores.items()
        for seed, of_seed in zip(seeds, of_seeds, strict=True)
        for one, (chosen, rejected) in zip(heldout, of_seed, strict=True)
    ]  # fmt: skip
    with writing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, PREDICTIONS), temporary)
