"""An instruction model from answered instructions: is it less surprised by good answers, and what does it answer?

Adapters learn -log p(token) of the answer's tokens and of what ends it; the prompt's are not learned. Of a text longer
than its data set's `max_tokens` the start is kept. Measured are

    nats a token = sum over held-out answers of -log p / sum of their tokens

of the backbone as it is and of every arm and seed; and each arm answers the instructions of `finetune.outputs_for` (its
first seed, adapters merged, greedily). AlpacaEval's own win rates (WR, LC) need its published judge: model_outputs.json
is in its format. With `llm.url` a local judge compares the arms by itself (`pairwise.py`), under its own name.

Reads instructions (`published.py`) and what synthesis wrote; writes eval.json, predictions.parquet (a row an answer,
arm and seed), arms/ARM/seed-N/ (adapters as peft reads them) and arms/ARM/model_outputs.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.config.file import Config
from fac_jax.downstream.arms import COMPARED, Arms, read_arms, read_outputs_for, train_arms
from fac_jax.downstream.encode import Encoded, encode_examples
from fac_jax.downstream.evaluate import bootstrap_mean, spread
from fac_jax.downstream.lora import merged
from fac_jax.downstream.pairwise import compare_outputs
from fac_jax.downstream.pieces import Group
from fac_jax.downstream.published import Example
from fac_jax.downstream.reward import training
from fac_jax.downstream.tune import Learned, make_tuner
from fac_jax.errors import UserError
from fac_jax.llm.client import Request
from fac_jax.llm.fluency import nats_per_token
from fac_jax.llm.generator import open_generator
from fac_jax.llm.local import LocalGenerator, model_name
from fac_jax.mesh import make_mesh
from fac_jax.runs import write_text, writing

UNTRAINED = "backbone"
"""The arm that nothing was added to."""
OUTPUTS = "model_outputs.json"
PREDICTIONS = pa.schema(
    {
        "arm": pa.string(), "seed": pa.int64(), "instruction": pa.string(), "source": pa.string(),
        "tokens": pa.int64(), "nats": pa.float32(),
    }
)  # fmt: skip


def completions(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage: train every arm with every seed, measure the held-out answers, answer instructions.

    Raises UserError as `read_arms` does, and for `finetune.method` head: completions have no head.
    """
    settings = config.finetune
    assert settings.train is not None
    if settings.method != "lora":
        raise UserError(
            f"finetune.method is {settings.method!r}: answers are learned by adapters in the backbone, and have no "
            "head; set finetune.method to lora"
        )
    arms = read_arms(config, inputs["synthesis"], "instruction")
    asked = read_outputs_for(config, arms)
    loaded = load_backbone(config.backbone.model, None, config.backbone.dtype, make_mesh(config.mesh))
    tuner = make_tuner(loaded, "completion", settings, config.backbone)
    trained = {
        arm: encode_examples(some, loaded.tokenizer, config.dataset(settings.train).max_tokens, "start")
        for arm, some in arms.training.items()
    }
    longest = config.dataset(settings.heldout).max_tokens
    heldout = encode_examples(arms.heldout, loaded.tokenizer, longest, "start")

    def measure(arm: str, seed: int, learned: Learned) -> Float[np.ndarray, " n"]:
        whole = merged(loaded, learned.adapters, settings.lora)
        if asked and seed == settings.seeds[0]:
            write_outputs(config, whole, asked, f"{arm}, seed {seed}", out / "arms" / arm / OUTPUTS)
        return answer_nats(whole, heldout.groups)

    groups = {arm: encoded.groups for arm, encoded in trained.items()}
    found = {UNTRAINED: [answer_nats(loaded, heldout.groups)], **train_arms(config, out, tuner, groups, measure)}
    nats = {arm: np.stack(of_seeds) for arm, of_seeds in found.items()}
    compared = _compared(config, out, list(groups)) if asked and config.llm.url is not None else None
    evaluation = _evaluation(config, arms, nats, trained, heldout, asked, compared)
    _write_predictions(out / "predictions.parquet", nats, arms.heldout, heldout.groups, settings.seeds)
    write_text(out / "eval.json", json.dumps(evaluation, indent=1, allow_nan=False))
    return {
        "heldout": len(arms.heldout),
        "nats_per_token": {arm: row["nats_per_token"]["mean"] for arm, row in evaluation["arms"].items()},
    }


def answer_nats(loaded: Loaded, groups: Sequence[Group]) -> Float[np.ndarray, " n"]:
    """Mean nats of each answer's tokens, given what stands before it."""
    texts = [text for (text,) in groups]
    firsts = [max(1, int(np.argmax(text.learned_t))) for text in texts]
    prompts = [text.ids_t[:first].tolist() for text, first in zip(texts, firsts, strict=True)]
    answers = [text.ids_t[first:].tolist() for text, first in zip(texts, firsts, strict=True)]
    return nats_per_token(loaded, prompts, answers)


def write_outputs(config: Config, whole: Loaded, asked: Sequence[Example], who: str, path: Path) -> None:
    """Answers in AlpacaEval's format; a file that is there is whole, and stays."""
    if path.exists():
        return
    writer = LocalGenerator(whole, config.backbone.model, config.llm.local_batch)
    requests = [
        Request(tuple(asdict(turn) for turn in one.prompt), config.finetune.output_tokens, seed=config.run.seed)
        for one in asked
    ]
    rows = [
        {
            "instruction": "\n\n".join(turn.content for turn in one.prompt), "output": reply.text.strip(),
            "generator": f"{model_name(config.backbone.model)} ({who})",
            "dataset": one.subset or str(config.finetune.outputs_for),
        }
        for one, reply in zip(asked, writer.generate(requests), strict=True)
    ]  # fmt: skip
    write_text(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


def _compared(config: Config, out: Path, arms: Sequence[str]) -> list[dict[str, Any]]:
    outputs = {arm: json.loads((out / "arms" / arm / OUTPUTS).read_text(encoding="utf-8")) for arm in arms}
    return compare_outputs(open_generator(config, make_mesh(config.mesh)), outputs, COMPARED, out, config.run.seed)


def _evaluation(
    config: Config,
    arms: Arms,
    nats: Mapping[str, Float[np.ndarray, "s n"]],
    trained: Mapping[str, Encoded],
    heldout: Encoded,
    asked: Sequence[Example],
    compared: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    """What eval.json holds; an interval is over held-out answers, of their means over seeds."""
    tokens_n = _tokens(heldout.groups)

    def row(of_seeds: Float[np.ndarray, "s n"]) -> dict[str, Any]:
        figures = [float(of_seed @ tokens_n / tokens_n.sum()) for of_seed in of_seeds.astype(np.float64)]
        interval = bootstrap_mean(of_seeds.mean(0, dtype=np.float64), tokens_n)
        return {"nats_per_token": asdict(spread(figures)), "interval": asdict(interval)}

    def difference(arm: str, other: str) -> dict[str, Any]:
        gap_n = nats[arm].mean(0, dtype=np.float64) - nats[other].mean(0, dtype=np.float64)
        return {"arm": arm, "minus": other, **asdict(bootstrap_mean(gap_n, tokens_n))}

    counts = {
        arm: {"instructions": len(some), "added": arms.added(arm), "cut": trained[arm].cut}
        for arm, some in arms.training.items()
    }
    outputs = {
        "data": config.finetune.outputs_for, "instructions": len(asked), "tokens": config.finetune.output_tokens,
        "files": {arm: f"arms/{arm}/{OUTPUTS}" for arm in arms.training},
    }  # fmt: skip
    return {
        "kind": "completions",
        "heldout": {
            "data": config.finetune.heldout, "instructions": len(arms.heldout), "tokens": int(tokens_n.sum()),
            "cut": heldout.cut,
        },
        "read": arms.counts,
        "arms": {arm: {**counts.get(arm, {}), **row(of_seeds)} for arm, of_seeds in nats.items()},
        "differences": [difference(*pair) for pair in (*COMPARED, ("seed", UNTRAINED))],
        "outputs": outputs if asked else None,
        "local_pairwise_judge": compared,
        "training": training(config),
    }  # fmt: skip


def _tokens(groups: Sequence[Group]) -> Float[np.ndarray, " n"]:
    """Tokens that are measured of each answer: the first token of all has nothing before it."""
    return np.array([text.learned_t[1:].sum() for (text,) in groups], np.float64)


def _write_predictions(
    path: Path,
    nats: Mapping[str, Float[np.ndarray, "s n"]],
    heldout: Sequence[Example],
    groups: Sequence[Group],
    seeds: Sequence[int],
) -> None:
    rows = [
        {
            "arm": arm, "seed": None if arm == UNTRAINED else seed, "instruction": one.id, "source": one.source,
            "tokens": int(tokens), "nats": float(value),
        }
        for arm, of_seeds in nats.items()
        for seed, of_seed in zip(seeds, of_seeds, strict=False)
        for one, tokens, value in zip(heldout, _tokens(groups), of_seed, strict=True)
    ]  # fmt: skip
    with writing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, PREDICTIONS), temporary)
