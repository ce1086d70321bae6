"""The vectors of several behaviours at one length, so that a multiplier means the same for each: as CAA does at every
layer, the mean of their norms (https://github.com/nrimsky/CAA/blob/main/normalize_vectors.py).

Reads what runs kept (`steer.equal_norm_with`); writes nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from fac_jax.downstream.choices import Question, read_samples
from fac_jax.errors import UserError
from fac_jax.runs import file_digest, read_record

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Behaviour:
    """What a run kept, and for which model."""

    run: str
    """Its directory."""
    task: str
    backbone: str
    """As its config names it."""
    model: str | list[str]
    """Fingerprints of that."""
    digest: str
    """Of kept.jsonl."""
    samples: tuple[Question, ...]


def behaviour_of(run: str) -> Behaviour:
    """Raises UserError where the directory holds no finished samples, none that were kept, or of another form."""
    file = Path(run) / "synthesis" / "kept.jsonl"
    record = read_record(file.parent)
    if record is None or not file.is_file():
        raise UserError(
            f"steer.equal_norm_with names {run}, but {file.parent} holds no finished samples: run `fac synthesize` "
            "with its config first, or leave it out"
        )
    samples = tuple(read_samples(file))
    if not samples:
        raise UserError(f"{file} is empty: no sample was kept, so it has no vector; leave {run} out")
    said = record.settings
    return Behaviour(
        run, said["writer"]["task"]["name"], said["backbone"]["model"], said["model"], file_digest(file), samples
    )


def behaviours_with(run: str, others: Sequence[str]) -> list[Behaviour]:
    """That of `run` and those of the others. Raises UserError for one of another model, or named twice."""
    own, *found = [behaviour_of(one) for one in (run, *others)]
    seen = {Path(run).resolve()}
    for one in found:
        if Path(one.run).resolve() in seen:
            raise UserError(f"steer.equal_norm_with names {one.run} beside itself: each behaviour counts once")
        if one.model != own.model:
            raise UserError(
                f"steer.equal_norm_with names {one.run}, whose samples were kept for {one.backbone}; this run's were "
                f"for {own.backbone}, whose files differ: make both with one backbone.model, or leave it out"
            )
        seen.add(Path(one.run).resolve())
    return [own, *found]


def equal_norm(vectors: Mapping[Name, Float[np.ndarray, " d"]]) -> dict[Name, Float[np.ndarray, " d"]]:
    """Each in its own direction, all as long as they are on average."""
    length = float(np.mean([np.linalg.norm(vector_d.astype(np.float64)) for vector_d in vectors.values()]))
    return {name: of_length(vector_d, length) for name, vector_d in vectors.items()}


def of_length(vector_d: Float[np.ndarray, " d"], length: float) -> Float[np.ndarray, " d"]:
    """The vector at another length, in float32. Raises UserError for one of length 0, which has no direction."""
    own = float(np.linalg.norm(vector_d.astype(np.float64)))
    if own == 0:
        raise UserError("a steering vector has length 0, so it has no direction: its samples cancel each other")
    return (vector_d.astype(np.float64) * (length / own)).astype(np.float32)
