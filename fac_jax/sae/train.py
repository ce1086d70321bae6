"""Stages `train` and `sweep`: an activation store to one sparse autoencoder, or to several from one reading of it.

Reads the store (training rows through `stream`, held-out rows in order). Writes what `fit.py` writes, and at the end
`sae.safetensors` and `config.json`; a sweep writes those of each SAE into a folder of its own, and `sweep.json` with
what each achieved on the held-out rows.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from fac_jax.activations.manifest import Manifest, check_holds
from fac_jax.activations.store import Rows, StoreReader
from fac_jax.activations.stream import batches, streams_for
from fac_jax.config import Config, SaeConfig, TrainConfig, Variant
from fac_jax.distributed import is_first
from fac_jax.mesh import make_mesh, own_rows, platform
from fac_jax.plain import to_plain
from fac_jax.runs import write_text
from fac_jax.sae.checkpoint import load_sae, save_sae
from fac_jax.sae.fit import Fitted, Member, fit
from fac_jax.sae.metrics import DENSITY_EDGES, Validation, validate
from fac_jax.sae.model import SAE
from fac_jax.sae.problem import decoding_plan, pose
from fac_jax.sae.step import unscaled

logger = logging.getLogger(__name__)
VALIDATION_BLOCKS = 64  # read from the store at a time
NESTING = (0.0625, 0.125, 0.25, 0.5, 1.0)  # of a sweep's Matryoshka variant, where sae.matryoshka says nothing


def train(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Train on `train.store` or on the run's own store; returns the summary.

    Raises UserError for a store of another model or layer, sizes that do not fit, a damaged checkpoint, and a loss
    that is not finite.
    """
    source = _open(config, inputs)
    problem = pose(config.sae, config.train, source.reader.d_model, source.reader.median_norm, platform(source.mesh))
    member = Member("sae", problem, config.run.seed, out, _start(config, source))
    fitted, (figures,) = _make(config, source, [member], out)
    return {
        **_trained_on(config.train),
        "store_rows": source.reader.rows,
        "epochs": round(config.train.steps * config.train.batch_rows / source.reader.rows, 2),
        "features": config.sae.features,
        "k": config.sae.k,
        **_summary(figures),
        "median_norm": source.reader.median_norm,
        "seconds": round(fitted.seconds, 2),
        "tokens_per_second": round(fitted.rows_per_second),
    }


def sweep(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Train every SAE that `config.sweep` asks for from one reading of the store; returns the summary.

    Raises UserError as `train` does.
    """
    source = _open(config, inputs)
    start = _start(config, source)
    scale = source.reader.d_model, source.reader.median_norm, platform(source.mesh)
    members = [
        Member(name, pose(sae, config.train, *scale), seed, out / name, start) for name, sae, seed in members_of(config)
    ]
    fitted, figures = _make(config, source, members, out)
    rows: list[dict[str, Any]] = [
        {"name": member.name, "variant": _variant(member.problem.sae), "features": member.problem.sae.features}
        | {"k": member.problem.sae.k, "seed": member.seed, **asdict(found)}
        for member, found in zip(members, figures, strict=True)
    ]
    if is_first():
        described = {**_trained_on(config.train), "density_edges": DENSITY_EDGES, "members": rows}
        write_text(out / "sweep.json", json.dumps(to_plain(described), indent=2, allow_nan=False) + "\n")
    return {
        **_trained_on(config.train),
        "saes": len(members),
        **{row["name"]: f"fvu {row['fvu']:.4f}, L0 {row['l0']:.1f}, dead {row['dead_fraction']:.1%}" for row in rows},
        "seconds": round(fitted.seconds, 2),
        "tokens_per_second": round(fitted.rows_per_second),
    }


def members_of(config: Config) -> list[tuple[str, SaeConfig, int]]:
    """(name, settings, seed) of every SAE of a sweep. Raises UserError for a combination that cannot be."""
    asked, base = config.sweep, config.sae
    combinations = itertools.product(
        dict.fromkeys(asked.variants or (_variant(base),)),
        dict.fromkeys(asked.features or (base.features,)),
        dict.fromkeys(asked.k or (base.k,)),
        dict.fromkeys(asked.seeds or (config.run.seed,)),
    )
    members = []
    for variant, features, k, seed in combinations:
        activation = base.activation if variant == "matryoshka" else variant
        fractions = (base.matryoshka or NESTING) if variant == "matryoshka" else ()
        sae = replace(base, activation=activation, matryoshka=fractions, features=features, k=k)
        members.append((f"{variant}-{features}-k{k}-seed{seed}", sae, seed))
    return members


class Source(NamedTuple):
    """The store, open, and the devices."""

    reader: StoreReader
    held_out: StoreReader
    mesh: Mesh


def _open(config: Config, inputs: Mapping[str, Path]) -> Source:
    store = config.train.store or inputs["activations"]
    source = Source(StoreReader(store, "train"), StoreReader(store, "validation"), make_mesh(config.mesh))
    check_holds(source.reader.manifest, store, model=config.backbone.model, layer=config.backbone.layer)
    return source


def _start(config: Config, source: Source) -> SAE | None:
    if config.train.init is None:
        return None
    digest = source.reader.manifest.model_digest
    return load_sae(config.train.init, source.mesh, source.reader.d_model, config.backbone.layer, digest).sae


def _make(config: Config, source: Source, members: Sequence[Member], out: Path) -> tuple[Fitted, list[Validation]]:
    """Train the members, measure them on the held-out rows, and write them."""
    for member in members:
        for line in decoding_plan(member.problem, source.mesh):
            logger.info("%s: decoding %s", member.name, line)
    settings, reader = config.train, source.reader
    streams = streams_for(reader, settings.batch_rows, settings.streams)
    # The published weights count a document's rows in the whole batch.
    spans = None if members[0].problem.official else own_rows(source.mesh, settings.batch_rows)

    def rows_from(step: int) -> Iterator[tuple[int, Rows]]:
        return batches(reader, settings.batch_rows, config.run.seed, step, streams, spans)

    held_out_bd = next(iter(_in_order(source.held_out)))
    fitted = fit(members, reader.mean, rows_from, source.mesh, out, held_out_bd)
    saes = [unscaled(state, one.problem) for one, state in zip(members, fitted.states, strict=True)]
    asked = [
        (sae, one.problem.sae.k if sae.threshold_f is None else None) for one, sae in zip(members, saes, strict=True)
    ]
    limit = members[0].problem.norm_limit
    figures = validate(asked, _in_order(source.held_out), settings.batch_rows, source.mesh, limit)
    for member, (sae, k), found in zip(members, asked, figures, strict=True):
        metrics = {name: value for name, value in asdict(found).items() if name != "density"}
        described = _trained_on(settings) | _origin(source.reader.manifest) | {"k": k, "metrics": metrics}
        described |= {"variant": _variant(member.problem.sae), "density": found.density}
        save_sae(member.folder, sae, described)
    return fitted, figures


def _trained_on(settings: TrainConfig) -> dict[str, int]:
    return {"steps": settings.steps, "rows": settings.steps * settings.batch_rows}


def _summary(figures: Validation) -> dict[str, Any]:
    """Figures on held-out rows, by the names that a summary gives them."""
    found = asdict(figures)
    density = found.pop("density")
    named = {f"validation_{name}" if name.startswith("rows") else name: value for name, value in found.items()}
    return {**named, "density": " ".join(map(str, density))}


def _variant(sae: SaeConfig) -> Variant:
    return "matryoshka" if sae.matryoshka else sae.activation


def _in_order(reader: StoreReader) -> Iterable[np.ndarray]:
    blocks = np.arange(len(reader.block_rows))
    for start in range(0, len(blocks), VALIDATION_BLOCKS):
        yield reader.read_blocks(blocks[start : start + VALIDATION_BLOCKS]).resid


def _origin(manifest: Manifest) -> dict[str, Any]:
    return {"layer": manifest.layer, "model": manifest.model, "model_digest": manifest.model_digest}
