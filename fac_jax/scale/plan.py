"""`fac plan CONFIG --topology v5e:16x16`: what training and harvest would take on machines that are not here.

Prints, for one device: memory against its limit, operations, bytes, every collective, the roofline and the predicted
time; then tokens a second and days. All of it is predicted by a model of costs (`predict.py`), none of it is measured.

A configuration that does not fit is refused, with the settings that would make it fit (`search.py`). jax is imported
only after the environment is set, so nothing that imports jax may be imported here at the top.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fac_jax.config.checks import check_output
from fac_jax.config.file import Config
from fac_jax.errors import UserError
from fac_jax.progress import progress
from fac_jax.runs import versions, write_text
from fac_jax.scale import tables
from fac_jax.scale.chips import Topology, read_topology
from fac_jax.scale.devices import has_libtpu, machine, prepare
from fac_jax.scale.predict import Plan, Step, harvest_step, train_step
from fac_jax.scale.search import advice, search


def run(config: Config, options: Mapping[str, str]) -> None:
    """The verb: plan, print, and write JSON where `--out` asks for it. Raises UserError where nothing fits."""
    topology = read_topology(options.get("topology", ""), whole(options, "slices") or 1)
    tokens = whole(options, "tokens")
    if "out" in options:
        check_output("--out", options["out"])
    budget = tokens or config.train.steps * config.train.batch_rows  # a search may change the batch, not the budget
    prepare(topology)
    if "search" in options:
        found = search(config, topology)
        tables.print_search(found)
        config = found.best(config)
    plan = make(config, topology, budget, tokens or config.harvest.tokens or budget)
    tables.print_plan(plan, config)
    if "out" in options:
        write_text(Path(options["out"]), json.dumps(as_json(plan, config), indent=1) + "\n")


def whole(options: Mapping[str, str], name: str) -> int | None:
    """A verb's option as a whole number above 0 (`2**20` and `1_000_000` are read); None where it is absent."""
    text = options.get(name)
    if text is None:
        return None
    base, _, power = text.replace("_", "").replace(",", "").partition("**")
    if not base.isdecimal() or (power and not power.isdecimal()):
        raise UserError(f"--{name} is {text!r}; it must be a whole number above 0")
    value = int(base) ** int(power or 1)
    if value < 1:
        raise UserError(f"--{name} is {text!r}; it must be above 0")
    return value


def make(config: Config, topology: Topology, train_tokens: int, harvest_tokens: int) -> Plan:
    """Compile and cost both stages, for so many tokens. Raises UserError, with advice, where training does not fit."""
    from fac_jax.scale.programs import OutOfMemory, model_config

    target, model = machine(topology), model_config(config.backbone.model)
    with progress("plan", 2, "programs") as bar:
        try:
            train = train_step(config, model.d_model, target)
        except OutOfMemory as found:
            raise UserError(advice(config, model.d_model, topology, found)) from None
        bar.advance(1, "train")
        harvest, refused = harvest_step(config, model, topology, bar)
    return Plan(topology, target.real, train, harvest, refused, train_tokens, harvest_tokens)


def as_json(plan: Plan, config: Config) -> dict[str, Any]:
    """The plan as plain values, for tables elsewhere."""
    return {
        "note": "predicted by a model of costs from compiled programs; nothing here was measured",
        "topology": plan.topology.name,
        "slices": plan.topology.slices,
        "chips": plan.topology.chips,
        "devices": plan.topology.devices,
        "compiled_for_target": plan.real,
        "libtpu": has_libtpu(),
        "chip": asdict(plan.topology.chip),
        "versions": versions(),
        "model": config.backbone.model,
        "layer": config.backbone.layer,
        "features": config.sae.features,
        "k": config.sae.k,
        "train": _step_json(plan.train, plan.train_tokens),
        "harvest": _step_json(plan.harvest, plan.harvest_tokens) if plan.harvest else {"refused": plan.harvest_refused},
    }


def _step_json(step: Step, tokens: int) -> dict[str, Any]:
    cost = step.cost
    return {
        "settings": step.settings,
        "tokens_per_step": step.tokens,
        "peak_bytes": step.program.peak_bytes,
        "program_bytes": step.program.code_bytes,
        "limit_bytes": step.limit_bytes,
        "flops": cost.sum(lambda op: op.work.matmul),
        "memory_bytes": cost.sum(lambda op: op.work.bytes),
        "collectives": tables.collectives(cost),
        "network_s": cost.network_s,
        "roofline_s": cost.floor_s,
        "roofline_side": cost.floor_side,
        "predicted_s": cost.seconds,
        "ratio": step.ratio,
        "waited_s": cost.waited_s,
        "first_k_s": step.first.seconds if step.first else None,
        "worst_s": step.worst.seconds,
        "parts": tables.parts(cost),
        "unknown_loops": cost.unknown_loops,
        "tokens_per_second": step.tokens_per_second,
        "tokens": tokens,
        "days": step.days(tokens),
    }
