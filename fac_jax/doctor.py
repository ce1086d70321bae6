"""What this machine offers, and whether a config can run on it: `fac doctor [CONFIG]`.

Asks everything that a run would trip over later: devices, mesh, model, data sets and labels, corpus files, room on the
disk, the server.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax

from fac_jax.backbone.weights import open_model
from fac_jax.config.file import Config
from fac_jax.corpus_files import resolve
from fac_jax.downstream.classifier import check_held_out
from fac_jax.errors import UserError
from fac_jax.llm.http import HttpGenerator
from fac_jax.mesh import make_mesh
from fac_jax.pipeline import check_data, scanned, trains_classifier
from fac_jax.runs import versions
from fac_jax.text import read_documents

PATIENCE_S = 30.0
"""Seconds for a server to answer; one that loads its model first may take longer, and is not ready then."""
NO_SERVER = (
    "llm.url is not set: the embedded methods explain, judge and write; `fac sidecar start CONFIG` runs a server here"
)
LEAST_FREE_BYTES = 2**30  # the quickstart's run directory takes about half of it


def checks(config: Config, named: bool = True) -> Iterator[tuple[str, bool, str]]:
    """(name, whether it is well, what was found or what to do), one at a time as they are made. `named`: whether
    somebody named a config; without one there is a machine to look at, and no run."""
    yield "versions", True, ", ".join(f"{name} {version}" for name, version in versions().items())
    yield "devices", True, f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})"
    yield from _check("mesh", partial(_mesh, config))
    if named:
        yield from _check("model", partial(_model, config))
    asked: dict[str, Callable[[], str]] = {"data": partial(_sets, config)} if named else {}
    asked |= {f"data.{name}": partial(_data, config, name) for name in config.data}
    sound = True
    for name, find in asked.items():
        for one in _check(name, find):
            sound &= one[1]
            yield one
    if named and sound and trains_classifier(config):
        yield from _check("held out", partial(_held_out, config))
    yield from _check("disk", partial(_disk, config))
    if config.llm.url:
        yield from _check("llm", partial(_server, config))
    else:
        yield "llm", True, NO_SERVER


def _check(name: str, find: Callable[[], str]) -> Iterator[tuple[str, bool, str]]:
    try:
        yield name, True, find()
    except UserError as error:
        yield name, False, str(error)


def _mesh(config: Config) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in make_mesh(config.mesh).shape.items())


def _model(config: Config) -> str:
    """What the model's own config says; of one on the hub only that small file is fetched."""
    source, layers = config.backbone.model, (*config.harvested_layers, *config.sweep.layers)
    has, _ = open_model(source)
    has.check_layer(max(layers), source)
    read = ", ".join(map(str, sorted({*layers})))
    return f"{source}: width {has.d_model:,}, {has.n_layers} layers; read at {read}"


def _sets(config: Config) -> str:
    return f"a run reads {', '.join(check_data(config))}"


def _data(config: Config, name: str) -> str:
    dataset = config.data[name]
    files = [file for source in (*dataset.sources, *dataset.without) for file in resolve(source.path)]
    if name in (config.harvest.data, *scanned(config)):  # others may hold pairs or answers, in fields of their own
        next(read_documents(dataset, name))
    return f"{len(files)} files, {sum(file.size for file in files) / 2**20:,.2f} MiB"


def _held_out(config: Config) -> str:
    if not check_held_out(config):
        return "not looked at: a run finds out whether it shares a text with the seed or the anchor"
    return f"{config.finetune.heldout} has both classes, and no text of the seed or the anchor"


def _disk(config: Config) -> str:
    folder = Path(config.run.dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    rows = "a harvested token takes 2 x d_model + 24 bytes"
    if config.train.activations == "live":
        rows = f"live rows take 4 x {config.train.live_buffer_rows:,} x d_model bytes of memory, and nothing here"
    found = f"{free / 2**30:,.1f} GiB free for {config.run.dir}; {rows}"
    if free < LEAST_FREE_BYTES:
        raise UserError(f"{found}; free some space or choose another run.dir")
    return found


def _server(config: Config) -> str:
    """Who answers at `llm.url`, and whether it follows a schema: one small question, a few tokens."""
    # Nothing is tried again here, and nothing is written: a doctor looks.
    generator = HttpGenerator(replace(config.llm, retries=0, timeout_s=min(config.llm.timeout_s, PATIENCE_S)))
    known = generator.meet()
    follows = (
        "follows JSON schemas" if generator.follows_schema else "ignores JSON schemas: many answers will not count"
    )
    return f"{known['url']} serves {known['model']} (its answers say {known['answers_as']}) and {follows}"
