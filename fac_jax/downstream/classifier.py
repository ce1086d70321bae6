"""Train a classifier on seed, seed + random generations and seed + kept generations; measure each on held-out text.

The paper's experiments on toxicity. head: the backbone is frozen and one linear head is trained on the mean residual of
a document's content tokens. lora: adapters in the backbone and a head on its last token (`tune.py`). Arms differ only
in the documents added to the seed set; `seed+random` holds as many generations as `seed+kept`, so what the SAE filter
adds is the difference between these two. `anchor` (every labelled anchor document) is an upper reference: what real
data would have given.

Reads labels, tokens and mean residuals from the scans of the seed, the anchor, the held-out set and what synthesis
wrote; only lora reads the backbone. Writes finetune/eval.json (metrics per arm and seed), finetune/predictions.parquet
(their scores) and, of lora, arms/ARM/seed-N/ with metrics.jsonl and the adapters as peft reads them.

Held-out documents are scored once, after the last step: nothing is tuned on them and there is no early stopping.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from fac_jax.backbone.weights import load_backbone
from fac_jax.config.downstream import FinetuneConfig
from fac_jax.config.file import Config
from fac_jax.downstream.arms import COMPARED, check_disjoint, check_texts_disjoint, train_arms
from fac_jax.downstream.evaluate import auprc, auroc, paired_bootstrap, spread
from fac_jax.downstream.head import balanced, fit
from fac_jax.downstream.pieces import Group, Text
from fac_jax.downstream.tune import Tuner, make_tuner, score_texts
from fac_jax.errors import UserError
from fac_jax.mesh import make_mesh
from fac_jax.runs import write_text, writing
from fac_jax.scan.product import Scan, load_scans
from fac_jax.text import POSITIVE_ABOVE, is_quickly_read, read_documents


@dataclass(frozen=True)
class Examples:
    """Labelled documents as the head sees them; `x_nd` is not standardised."""

    ids: tuple[str, ...]
    x_nd: Float[np.ndarray, "n d"]
    positive_n: Bool[np.ndarray, " n"]
    tokens: tuple[Int[np.ndarray, " t"], ...]
    """Under the chat template, as they were scanned."""
    texts: tuple[str, ...]
    """The user's turns."""

    def plus(self, other: Examples) -> Examples:
        """These, and those of `other` that are not among these."""
        mine = set(self.ids)
        new = [row for row, name in enumerate(other.ids) if name not in mine]
        return Examples(
            self.ids + tuple(other.ids[row] for row in new),
            np.concatenate([self.x_nd, other.x_nd[new]]),
            np.concatenate([self.positive_n, other.positive_n[new]]),
            self.tokens + tuple(other.tokens[row] for row in new),
            self.texts + tuple(other.texts[row] for row in new),
        )

    @property
    def has_both_classes(self) -> bool:
        return bool(self.positive_n.any()) and not bool(self.positive_n.all())


def classifier(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage: train every arm with every seed, score the held-out set, write eval.json and predictions.parquet.

    Raises UserError when a held-out document is in a training arm, when the held-out set lacks labels or a class, or
    when no arm can be trained. An arm without documents of both classes is reported as not trained, with the reason.
    """
    names = _scans(config)
    scans = load_scans(*(inputs[scan] for scan in names.values()))
    examples = {name: labelled(scan) for name, scan in zip(names, scans, strict=True)}
    heldout = examples.pop("heldout")
    _check_classes(config.finetune.heldout, set() if heldout is None else set(heldout.positive_n.tolist()))
    assert heldout is not None
    arms = _arms(examples)
    for name, arm in arms.items():
        check_disjoint(arm.ids, heldout.ids, name, config.finetune.heldout)
        held = zip(heldout.ids, heldout.texts, strict=True)
        check_texts_disjoint(zip(arm.ids, arm.texts, strict=True), held, name, config.finetune.heldout)
    if not any(arm.has_both_classes for arm in arms.values()):
        raise UserError(
            "no training arm has documents of both classes; give the sources of coverage.seed a label field"
        )
    trained = {name: arm for name, arm in arms.items() if arm.has_both_classes}
    if config.finetune.method == "lora":
        scores = tuned_scores(config, out, trained, heldout, scans[0].identity.model_digest)
    else:
        scores = {name: head_scores(config, arm, heldout, arms["seed"]) for name, arm in trained.items()}
    evaluation = _evaluation(config, arms, scores, heldout)
    _write_predictions(out / "predictions.parquet", scores, heldout, config.finetune.seeds)
    write_text(out / "eval.json", json.dumps(evaluation, indent=1, allow_nan=False))
    return {
        "base_rate": evaluation["heldout"]["base_rate"],
        "auprc": {name: row["auprc"]["mean"] for name, row in evaluation["arms"].items() if "auprc" in row},
    }


def check_held_out(config: Config) -> bool:
    """Raise UserError now for what the stage would refuse in the end, of the seed, the anchor and the held-out set.

    Reads them; False, without a look, where one of them is not quickly read.
    """
    heldout, *training = config.finetune.heldout, config.coverage.seed, config.coverage.anchor
    if not all(is_quickly_read(config.dataset(name)) for name in (heldout, *training)):
        return False
    measured = _labelled_documents(config, heldout)
    _check_classes(heldout, {positive for *_, positive in measured})
    ids, texts = [one for one, *_ in measured], [(one, text) for one, text, _ in measured]
    for name in training:
        arm = _labelled_documents(config, name)
        check_disjoint([one for one, *_ in arm], ids, name, heldout)
        check_texts_disjoint([(one, text) for one, text, _ in arm], texts, name, heldout)
    return True


def _labelled_documents(config: Config, name: str) -> list[tuple[str, str, bool]]:
    """Id, text and class of each labelled document of a data set."""
    documents = read_documents(config.dataset(name), name)
    return [(one.id, one.text, one.label > POSITIVE_ABOVE) for one in documents if one.label is not None]


def _check_classes(heldout: str, classes: set[bool]) -> None:
    if len(classes) < 2:
        raise UserError(
            f"data set {heldout!r} has no labelled documents of both classes, so nothing can be measured on it; give "
            "its sources a label field or set finetune.heldout"
        )


def _scans(config: Config) -> dict[str, str]:
    """The scan of each group of documents."""
    names = {"seed": config.coverage.seed, "anchor": config.coverage.anchor, "heldout": config.finetune.heldout}
    return {group: f"scan:{name}" for group, name in {**names, "random": "random", "kept": "kept"}.items()}


def labelled(scan: Scan) -> Examples | None:
    """Labelled documents of a scan; None where there is none.

    Raises UserError for one without a content token: it has no residual to be judged by.
    """
    rows = np.flatnonzero(~np.isnan(scan.labels_n))
    if not len(rows):
        return None
    silent = rows[scan.content_tokens_n[rows] == 0]
    if len(silent):
        source = scan.documents("source")["source"][int(silent[0])]
        raise UserError(
            f"{len(silent)} labelled documents of data set {scan.identity.name!r} have no content token, the first is "
            f"{scan.ids_n[silent[0]]} ({source}); raise the data set's max_tokens or leave them out"
        )
    table = scan.documents("token_ids", "text").take(pa.array(rows))
    return Examples(
        tuple(scan.ids_n[rows].tolist()),
        scan.mean_residuals()[rows],
        scan.labels_n[rows] > POSITIVE_ABOVE,
        tuple(np.asarray(ids, np.int32) for ids in table["token_ids"].to_pylist()),
        tuple(table["text"].to_pylist()),
    )


def _arms(examples: Mapping[str, Examples | None]) -> dict[str, Examples]:
    """Documents of each arm, in the order of the report's table; an arm may lack documents, or those of a class."""
    some = next((part for part in examples.values() if part is not None), None)
    if some is None:
        raise UserError("no training arm has labelled documents; give the sources of coverage.seed a label field")
    none = Examples((), some.x_nd[:0], some.positive_n[:0], (), ())
    seed, random, kept, anchor = (examples[name] or none for name in ("seed", "random", "kept", "anchor"))
    return {"seed": seed, "seed+random": seed.plus(random), "seed+kept": seed.plus(kept), "anchor": anchor}


def head_scores(config: Config, arm: Examples, heldout: Examples, seed: Examples) -> Float[np.ndarray, "s n"]:
    """Logits of the held-out documents, one row per training seed.

    Features are standardised with the mean and deviation of the seed arm, the same for every arm.
    """
    reference = seed if seed.ids else arm
    mean_d, sd_d = reference.x_nd.mean(0), reference.x_nd.std(0) + 1e-6
    head_sd, bias_s = fit((arm.x_nd - mean_d) / sd_d, arm.positive_n, config.finetune)
    return head_sd @ ((heldout.x_nd - mean_d) / sd_d).T + bias_s[:, None]


def tuned_scores(
    config: Config, out: Path, arms: Mapping[str, Examples], heldout: Examples, model: str
) -> dict[str, Float[np.ndarray, "s n"]]:
    """The same of adapters and head, of every arm; `model` is the digest of the backbone that made the scans."""
    tuner = open_tuner(config, config.finetune, model)
    held = groups_of(heldout)
    found = train_arms(
        config, out, tuner, {name: groups_of(arm) for name, arm in arms.items()},
        lambda name, seed, learned: score_texts(tuner, learned, held)[:, 0],
    )  # fmt: skip
    return {name: np.stack(of_seeds) for name, of_seeds in found.items()}


def open_tuner(config: Config, settings: FinetuneConfig, model: str) -> Tuner:
    """The whole backbone, ready to be tuned as a classifier. Raises UserError where it is another one than `model`."""
    loaded = load_backbone(config.backbone.model, None, config.backbone.dtype, make_mesh(config.mesh))
    if loaded.digest != model:
        raise UserError(
            f"the scans were made with model {model}, {config.backbone.model} is {loaded.digest}: scan again"
        )
    return make_tuner(loaded, "classifier", settings, config.backbone)


def groups_of(examples: Examples) -> list[Group]:
    rows = zip(examples.tokens, examples.positive_n, balanced(examples.positive_n), strict=True)
    return [(Text(ids, np.zeros(len(ids), bool), float(positive), float(weight)),) for ids, positive, weight in rows]


def _evaluation(
    config: Config, arms: Mapping[str, Examples], scores: Mapping[str, Float[np.ndarray, "s n"]], heldout: Examples
) -> dict[str, Any]:
    """What eval.json holds: metrics per arm, differences between arms, and how they were made."""
    positive_n = heldout.positive_n
    return {
        "heldout": {
            "data": config.finetune.heldout,
            "documents": len(positive_n),
            "positive": int(positive_n.sum()),
            "base_rate": float(positive_n.mean()),
        },
        "arms": {
            name: {"added": _added(name, arm, arms["seed"]), **_arm_row(arm, scores.get(name), positive_n)}
            for name, arm in arms.items()
        },
        "differences": [
            {"arm": arm, "minus": other, **dataclasses.asdict(paired_bootstrap(positive_n, scores[arm], scores[other]))}
            for arm, other in COMPARED
            if arm in scores and other in scores
        ],
        "head": {
            "method": config.finetune.method,
            "features": _features(config),
            "imbalance": "both classes of an arm have the same total weight in the loss",
            "epochs": config.finetune.epochs,
            "learning_rate": config.finetune.learning_rate,
            "batch": config.finetune.batch,
            "seeds": list(config.finetune.seeds),
        },
    }


def _features(config: Config) -> str:
    if config.finetune.method == "head":
        return f"mean residual of content tokens, layer {config.backbone.layer}, standardised on the seed arm"
    lora = config.finetune.lora
    return f"last token behind the final norm, with adapters of rank {lora.rank} on {', '.join(lora.matrices)}"


def _added(name: str, arm: Examples, seed: Examples) -> int:
    """Documents an arm adds to the seed; one that was in the seed already adds nothing."""
    return len(arm.ids) - len(seed.ids) if name.startswith("seed+") else 0


def _arm_row(
    arm: Examples, scores: Float[np.ndarray, "s n"] | None, positive_n: Bool[np.ndarray, " n"]
) -> dict[str, Any]:
    row: dict[str, Any] = {"documents": len(arm.ids), "positive": int(arm.positive_n.sum())}
    if scores is None:
        return {**row, "not_trained": "documents of one class only" if arm.ids else "no labelled documents"}
    for name, metric in (("auprc", auprc), ("auroc", auroc)):
        row[name] = dataclasses.asdict(spread([metric(positive_n, of_seed) for of_seed in scores]))
    return row


def _write_predictions(
    path: Path, scores: Mapping[str, Float[np.ndarray, "s n"]], heldout: Examples, seeds: Sequence[int]
) -> None:
    rows = [
        {"arm": arm, "seed": seed, "document_id": name, "positive": bool(positive), "logit": float(logit)}
        for arm, of_seeds in scores.items()
        for seed, of_seed in zip(seeds, of_seeds, strict=True)
        for name, positive, logit in zip(heldout.ids, heldout.positive_n, of_seed, strict=True)
    ]
    with writing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
