"""What is trained on what: the seed's examples, with as many blind samples, with the kept ones; never a held-out one.

The loop over arms and seeds that all objectives share, and the checks that keep training and evaluation apart. Reads
what synthesis wrote and the data sets of the config; writes arms/ARM/seed-N/ (metrics.jsonl, the adapters as peft reads
them).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fac_jax.config.data import DataSet, Source
from fac_jax.config.file import Config
from fac_jax.downstream.lora import save_peft
from fac_jax.downstream.pieces import Group
from fac_jax.downstream.published import Example, Kind, Read, read_examples
from fac_jax.downstream.tune import Learned, Tuner, tune
from fac_jax.errors import UserError
from fac_jax.packing import check_fits
from fac_jax.words import words

T = TypeVar("T")
COMPARED = (("seed+kept", "seed"), ("seed+random", "seed"), ("seed+kept", "seed+random"))
"""Pairs of arms whose difference gets an interval."""


@dataclass(frozen=True)
class Arms:
    """Examples to train on, by arm, and those that none of them may hold."""

    training: dict[str, tuple[Example, ...]]
    """seed, seed+random, seed+kept."""
    heldout: tuple[Example, ...]
    counts: dict[str, dict[str, Any]]
    """Of each group that was read: rows, duplicates, and malformed rows left out."""

    def added(self, arm: str) -> int:
        """Examples that an arm adds to the seed."""
        return len(self.training[arm]) - len(self.training["seed"])


def read_arms(config: Config, synthesis: Path, kind: Kind) -> Arms:
    """All that is trained on and measured on.

    Raises UserError for a malformed row, for a data set with none, for texts that no packed row can hold, and for a
    held-out example in an arm.
    """
    settings = config.finetune
    assert settings.train is not None
    found = {
        name: _read(config, data, kind) for name, data in (("seed", settings.train), ("heldout", settings.heldout))
    }
    # The fields that the config names are those of the data sets: these two files are in a form of our own.
    unnamed = replace(settings, prompt=None, answer=None, rejected=None)
    for name in ("random", "kept"):
        files = DataSet((Source(str(synthesis / f"{name}.jsonl")),))
        found[name] = read_examples(files, kind, unnamed)
    seed = found["seed"].examples
    training = {"seed": seed, **{f"seed+{name}": _plus(seed, found[name].examples) for name in ("random", "kept")}}
    heldout = found["heldout"].examples
    for arm, examples in training.items():
        check_apart(examples, heldout, arm, settings.heldout)
    counts = {
        name: {"rows": len(one.examples), "duplicates": one.duplicates, "skipped": list(one.skipped)}
        for name, one in found.items()
    }
    return Arms(training, heldout, counts)


def read_outputs_for(config: Config, arms: Arms) -> tuple[Example, ...]:
    """Instructions that every arm is to answer. Raises UserError where an arm was trained on one."""
    name = config.finetune.outputs_for
    if name is None:
        return ()
    found = _read(config, name, "prompt").examples
    for arm, examples in arms.training.items():
        check_apart(examples, found, arm, name)
    return found


def check_disjoint(training: Sequence[str], heldout: Sequence[str], arm: str, name: str) -> None:
    """Raise UserError naming a document, by its id, that is both trained on and measured on."""
    shared = sorted(set(training) & set(heldout))
    if shared:
        raise UserError(
            f"{len(shared)} documents are both in training arm {arm!r} and in held-out data set {name!r}, the first is "
            f"{shared[0]}; give the two data sets disjoint `split` ranges"
        )


def check_texts_disjoint(
    training: Iterable[tuple[str, str]], heldout: Iterable[tuple[str, str]], arm: str, name: str
) -> None:
    """The same of documents as (id, text) that differ in case and punctuation only."""
    measured = {words(text): one for one, text in heldout}
    shared = [(one, measured[said]) for one, text in training if (said := words(text)) in measured]
    if shared:
        raise UserError(
            f"{len(shared)} documents of training arm {arm!r} are word for word in held-out data set {name!r}, the "
            f"first is {shared[0][0]}, there {shared[0][1]}; name the sources of the one under `without` of the other"
        )


def check_apart(training: Sequence[Example], heldout: Sequence[Example], arm: str, name: str) -> None:
    """Raise UserError naming an example that is both trained on and measured on: one with the same prompt or, where
    either has none, with the same answers, in the same words."""
    asked = {one.asked: one for one in heldout if one.prompt}
    alone = {one.answered: one for one in heldout if not one.prompt}
    answered = {one.answered: one for one in heldout if one.answers}
    shared = []
    for one in training:
        if one.prompt:
            there = asked.get(one.asked) or alone.get(one.answered)
        else:
            there = answered.get(one.answered)
        if there is not None:
            shared.append((one.source, there.source))
    if shared:
        raise UserError(
            f"{len(shared)} examples of training arm {arm!r} are in held-out data set {name!r} (the same words), the "
            f"first is {shared[0][0]}, there {shared[0][1]}; give the two data sets disjoint `split` ranges, or leave "
            "out one of the two"
        )


def train_arms(
    config: Config,
    out: Path,
    tuner: Tuner,
    arms: Mapping[str, Sequence[Group]],
    measure: Callable[[str, int, Learned], T],
) -> dict[str, list[T]]:
    """Adapters of every arm with every seed, saved for peft; what `measure(arm, seed, learned)` says of each.

    Checkpoints stay: whatever stops the run before it is done, it goes on from them (`drop_checkpoints`).
    """
    found: dict[str, list[T]] = {}
    for name, groups in arms.items():
        for seed in config.finetune.seeds:
            folder = out / "arms" / name / f"seed-{seed}"
            learned = tune(tuner, groups, seed, folder)
            save_peft(folder, learned.adapters, learned.head_d, config.finetune.lora, config.backbone.model)
            found.setdefault(name, []).append(measure(name, seed, learned))
    return found


def drop_checkpoints(out: Path) -> None:
    """Those of `train_arms`, once nothing is left to do that could fail."""
    for folder in out.glob("arms/*/seed-*/checkpoints"):
        shutil.rmtree(folder)


def _read(config: Config, name: str, kind: Kind) -> Read:
    dataset = config.dataset(name)
    check_fits(dataset, name, config.backbone)
    found = read_examples(dataset, kind, config.finetune)
    if not found.examples:
        raise UserError(
            f"data.{name} has no {kind}: {', '.join(s.path for s in dataset.sources) or 'it lists no sources'} gave "
            "nothing under its split, sample and limit; widen them or mend the path"
        )
    return found


def _plus(examples: tuple[Example, ...], more: tuple[Example, ...]) -> tuple[Example, ...]:
    """These, and those of `more` that are not among these."""
    mine = {one.id for one in examples}
    return (*examples, *(one for one in more if one.id not in mine))
