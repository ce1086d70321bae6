"""Stages `train` and `sweep`: residuals to one sparse autoencoder, or to several of one layer from one reading of them.

Reads a store (training rows through `stream`, held-out rows in order), or computes the rows live from a corpus. Writes
what `fit.py` writes, and at the end `sae.safetensors` and `config.json`; a sweep writes those of each SAE into a folder
of its own, and `sweep.json` with what each achieved on the held-out rows.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float64

from fac_jax.activations.live import LiveRows
from fac_jax.activations.manifest import check_holds
from fac_jax.activations.reader import StoreReader
from fac_jax.activations.store import layer_path, store_of
from fac_jax.activations.stream import batches, streams_for
from fac_jax.config.file import Config
from fac_jax.config.sae import SaeConfig, TrainConfig, Variant
from fac_jax.distributed import is_first
from fac_jax.mesh import make_mesh, own_rows, platform
from fac_jax.plain import to_plain
from fac_jax.runs import write_text
from fac_jax.sae.checkpoint import load_sae, save_sae
from fac_jax.sae.fit import Fitted, Member, RowsFrom, fit
from fac_jax.sae.metrics import DENSITY_EDGES, Validation, validate
from fac_jax.sae.model import SAE
from fac_jax.sae.problem import decoding_plan, pose
from fac_jax.sae.step import unscaled

logger = logging.getLogger(__name__)
VALIDATION_BLOCKS = 64  # read from the store at a time
Spans = Sequence[tuple[int, int]] | None
NESTING = (0.0625, 0.125, 0.25, 0.5, 1.0)  # of a sweep's Matryoshka variant, where sae.matryoshka says nothing


def train(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Train on `train.store`, on the run's own store, or live from the backbone; returns the summary.

    Raises UserError for a store of another model or layer, sizes that do not fit, a damaged checkpoint, and a loss
    that is not finite.
    """
    with _open(config, out, inputs) as source:
        problem = pose(config.sae, config.train, source.d_model, source.median_norm, platform(source.mesh))
        member = Member("sae", problem, config.run.seed, out, _start(config, source))
        fitted, (figures,) = _make(config, source, [member], out)
    return {
        **_trained_on(config.train),
        **source.account(),
        "features": config.sae.features,
        "k": config.sae.k,
        **_summary(figures),
        "median_norm": source.median_norm,
        **_speed(fitted),
    }


def sweep(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Train every SAE that `config.sweep` asks for, those of a layer from one reading of its rows; returns the summary.

    Raises UserError as `train` does.
    """
    layers = dict.fromkeys(config.sweep.layers) or {config.backbone.layer: None}
    places = {layer: layer_path("", layer).strip("/") if config.sweep.layers else "" for layer in layers}
    asked = {layer: replace(config, backbone=replace(config.backbone, layer=layer)) for layer in layers}
    for one in asked.values():
        if config.train.activations == "store":
            store_of(one, inputs)  # a layer that is not there is said before the others are trained on
    rows: list[dict[str, Any]] = []
    accounts: dict[str, Any] = {}
    for layer, one in asked.items():
        found, account = _sweep_layer(one, out / places[layer], inputs)
        rows += [{**row, "name": f"{places[layer]}/{row['name']}".lstrip("/")} for row in found]
        accounts |= {f"{places[layer]} {name}".lstrip(): value for name, value in account.items()}
    if is_first():
        described = {**_trained_on(config.train), "density_edges": DENSITY_EDGES, "members": rows}
        write_text(out / "sweep.json", json.dumps(to_plain(described), indent=2, allow_nan=False) + "\n")
    return {
        **_trained_on(config.train),
        "saes": len(rows),
        **{row["name"]: f"fvu {row['fvu']:.4f}, L0 {row['l0']:.1f}, dead {row['dead_fraction']:.1%}" for row in rows},
        **accounts,
    }


def _sweep_layer(config: Config, out: Path, inputs: Mapping[str, Path]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train all members on the rows of `backbone.layer`: what each achieved, and what is said of rows and time."""
    with _open(config, out, inputs) as source:
        start = _start(config, source)
        scale = source.d_model, source.median_norm, platform(source.mesh)
        members = [
            Member(name, pose(sae, config.train, *scale), seed, out / name, start)
            for name, sae, seed in members_of(config)
        ]
        fitted, figures = _make(config, source, members, out)
    rows: list[dict[str, Any]] = [
        {"name": member.name, "layer": source.layer, "variant": _variant(member.problem.sae)}
        | {"features": member.problem.sae.features, "k": member.problem.sae.k, "seed": member.seed, **asdict(found)}
        for member, found in zip(members, figures, strict=True)
    ]
    return rows, {**source.account(), **_speed(fitted)}


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


@dataclass(frozen=True)
class Source:
    """Where the rows come from, and the devices that train on them."""

    mesh: Mesh
    model: str
    model_digest: str
    layer: int
    d_model: int
    mean_d: Float64[np.ndarray, " d"]
    """Mean residual of the training rows."""
    median_norm: float
    rows_from: RowsFrom
    held_out: Callable[[], Iterable[np.ndarray]]
    """Blocks of held-out rows, in order."""
    account: Callable[[], dict[str, Any]]
    """What the summary says of the rows, once training has ended."""


@contextmanager
def _open(config: Config, out: Path, inputs: Mapping[str, Path]) -> Iterator[Source]:
    mesh = make_mesh(config.mesh)
    # The published weights count a document's rows in the whole batch.
    spans = None if config.train.compat == "official" else own_rows(mesh, config.train.batch_rows)
    if config.train.activations == "store":
        yield _from_store(config, inputs, mesh, spans)
        return
    with closing(LiveRows(config, out, spans)) as live:
        yield _from_live(config, live, mesh)


def _from_store(config: Config, inputs: Mapping[str, Path], mesh: Mesh, spans: Spans) -> Source:
    store = store_of(config, inputs)
    assert store is not None
    settings, skip = config.train, config.train.on_bad_chunk
    reader, held_out = StoreReader(store, "train", skip), StoreReader(store, "validation", skip)
    manifest = reader.manifest
    check_holds(manifest, store, model=config.backbone.model, layer=config.backbone.layer)
    streams = streams_for(reader, settings.batch_rows, settings.streams)
    return Source(
        *(mesh, manifest.model, manifest.model_digest, manifest.layer, manifest.d_model),
        mean_d=reader.mean,
        median_norm=reader.median_norm,
        rows_from=lambda step, with_origin: batches(
            reader, settings.batch_rows, config.run.seed, step, streams, spans, with_origin
        ),
        held_out=lambda: _in_order(held_out),
        account=lambda: {
            "store_rows": reader.rows,
            "store_rows_left_out": reader.left_out,
            "epochs": round(settings.steps * settings.batch_rows / reader.rows, 2),
        },
    )


def _from_live(config: Config, live: LiveRows, mesh: Mesh) -> Source:
    found = live.statistics
    return Source(
        *(mesh, found.model, found.model_digest, found.layer, len(found.mean)),
        mean_d=live.mean,
        median_norm=found.median_norm,
        rows_from=lambda step, with_origin: live.batches(step),  # origin costs nothing here
        held_out=lambda: [live.held_out_bd],
        account=lambda: {
            "activations": "live",
            "live_buffer_rows": live.streams * live.window_rows,
            "whole_epochs": live.whole_epochs(),
        },
    )


def _start(config: Config, source: Source) -> SAE | None:
    if config.train.init is None:
        return None
    return load_sae(config.train.init, source.mesh, source.d_model, config.backbone.layer, source.model_digest).sae


def _make(config: Config, source: Source, members: Sequence[Member], out: Path) -> tuple[Fitted, list[Validation]]:
    """Train the members, measure them on the held-out rows, and write them."""
    for member in members:
        for line in decoding_plan(member.problem, source.mesh):
            logger.info("%s: decoding %s", member.name, line)
    held_out_bd = next(iter(source.held_out()))
    fitted = fit(members, source.mean_d, source.rows_from, source.mesh, out, held_out_bd)
    saes = [unscaled(state, one.problem) for one, state in zip(members, fitted.states, strict=True)]
    asked = [
        (sae, one.problem.sae.k if sae.threshold_f is None else None) for one, sae in zip(members, saes, strict=True)
    ]
    limit = members[0].problem.norm_limit
    figures = validate(asked, source.held_out(), config.train.batch_rows, source.mesh, limit)
    for member, (sae, k), found in zip(members, asked, figures, strict=True):
        metrics = {name: value for name, value in asdict(found).items() if name != "density"}
        described = _trained_on(config.train) | _origin(source) | {"k": k, "metrics": metrics}
        described |= {"variant": _variant(member.problem.sae), "density": found.density}
        save_sae(member.folder, sae, described)
    return fitted, figures


def _speed(fitted: Fitted) -> dict[str, Any]:
    return {
        "seconds": round(fitted.seconds, 2),
        "tokens_per_second": round(fitted.rows_per_second),
        "data_wait": round(fitted.data_wait, 4),
    }


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
        yield reader.read_blocks(blocks[start : start + VALIDATION_BLOCKS], with_origin=False).resid


def _origin(source: Source) -> dict[str, Any]:
    return {"layer": source.layer, "model": source.model, "model_digest": source.model_digest}
