"""A plan in words and tables, for a terminal."""

from __future__ import annotations

import re
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from fac_jax.config.file import Config
from fac_jax.scale.cost import Cost
from fac_jax.scale.predict import Plan, Step
from fac_jax.scale.search import Found

SHOWN = 8
"""Parts of a step that are shown, those that take the longest."""
PREDICTED = (
    "These are predictions of a model of costs, from compiled programs and data sheets; nothing was measured. Gathers, "
    "scatters, sorts and top-k are counted by bytes and operations, and may take longer on the chip."
)
STAND_IN = (
    "libtpu is not installed here (bash launch/plan.sh installs it), or the target is no TPU: CPU devices stood in. "
    "The collectives and matmuls are those of the same program, but fusion, layouts, what is overlapped and the memory "
    "are those of XLA's CPU compiler: memory and times are rougher, and a program that fits here need not fit there."
)
SIDES = {"matmul": "the matrix units", "vector": "the vector units", "memory": "main memory", "network": "the network"}
_NOISE = re.compile(r"^(jit\(.*\)|jvp\(\)|transpose\(jvp\(\)\)|shard_map|cond|while|body|closed_call|branch_\d+_fun|)$")


def print_plan(plan: Plan, config: Config) -> None:
    """Everything that a plan says."""
    out = _console()
    topology, sae = plan.topology, config.sae
    where = f"{topology.name}{f', {topology.slices} slices' if topology.slices > 1 else ''}"
    out.print(f"{where}: {topology.chips} chips of {topology.chip.name}" + _of_devices(plan))
    out.print(f"figures of the chip: {topology.chip.source}", style="dim")
    out.print(f"{config.backbone.model}, layer {config.backbone.layer}; {sae.features:,} features, K {sae.k}")
    _print_step(out, plan.train, plan.train_tokens)
    if plan.harvest:
        _print_step(out, plan.harvest, plan.harvest_tokens)
    else:
        out.print(f"\nharvest: not on this topology, {plan.harvest_refused}")
    out.print()
    if not plan.real:
        out.print(STAND_IN)
    out.print(PREDICTED)


def print_search(found: Found) -> None:
    """The candidates, best first, and what was left out."""
    out = _console()
    table = Table(
        "mesh.data", "mesh.feature", "train.batch_rows", "memory GiB", "step ms", "tokens/s", "to roofline", box=None
    )
    for column in table.columns:
        column.justify = "right"
    for one in found.fitting:
        settings, memory = one.settings, one.program.peak_bytes / 2**30
        cells = (settings[name] for name in ("mesh.data", "mesh.feature", "train.batch_rows"))
        table.add_row(
            *(f"{cell:,}" for cell in cells), f"{memory:.2f}", f"{one.cost.seconds * 1e3:,.1f}",
            f"{one.tokens_per_second:,.0f}", f"{one.ratio:.2f}x",
        )  # fmt: skip
    out.print("search: at the last K only, so that each compiles fast; what is best is planned in full below")
    out.print(table)
    for settings, why in found.refused:
        out.print(f"not: {' '.join(f'{name} {value:,}' for name, value in settings.items())}: {why}")


def _of_devices(plan: Plan) -> str:
    devices = plan.topology.devices
    return "" if devices == plan.topology.chips else f" ({devices} devices)"


def _print_step(out: Console, step: Step, tokens: int) -> None:
    cost, program = step.cost, step.program
    flags = ", ".join(
        f"{name} {value:,}" if type(value) is int else f"{name} {value}" for name, value in step.settings.items()
    )
    out.print(f"\n[bold]{step.stage}[/]  {flags}")
    table = Table("per device", "", box=None, show_header=False)
    limit = step.limit_bytes / 2**30
    code = f", program {program.code_bytes / 2**30:.2f}" if program.code_bytes else ""
    table.add_row("memory", f"{program.peak_bytes / 2**30:.2f} GiB at its peak{code}, of {limit:.2f} GiB")
    table.add_row("matmuls", f"{cost.sum(lambda op: op.work.matmul) / 1e12:.3f} TFLOP a step")
    table.add_row("main memory", f"{cost.sum(lambda op: op.work.bytes) / 1e9:.2f} GB read and written a step")
    table.add_row(
        "network",
        f"{cost.network_s * 1e3:.2f} ms in collectives, {cost.waited_s * 1e3:.2f} ms of waiting that nothing hides",
    )
    table.add_row(
        "roofline",
        f"{cost.floor_s * 1e3:.2f} ms at peak, bound by {SIDES[cost.floor_side]}: the matmuls, gathers and scatters",
    )
    table.add_row(
        "predicted",
        f"{cost.seconds * 1e3:.2f} ms a step, {step.ratio:.2f} x roofline; most of it waits for {_side(cost)}",
    )
    if step.stage == "train":
        table.add_row(
            "",
            f"at the last K, none dead, features spread evenly (dearest branches: {step.worst.seconds * 1e3:.2f} ms)",
        )
        if step.first:
            table.add_row("", f"{step.first.seconds * 1e3:.2f} ms at the first K of the schedule")
    for loop in cost.unknown_loops:
        table.add_row("", f"loop {loop}: its turns are unknown, and counted as one")
    out.print(table)
    _print_parts(out, cost)
    _print_collectives(out, cost)
    days = step.days(tokens)
    span = f"{days:,.2f} days" if days >= 1 else f"{days * 24:,.2f} hours"
    kind = "" if step.stage == "train" else " (padding and template included)"
    out.print(f"all devices: {step.tokens_per_second:,.0f} tokens/s{kind}, {span} for {tokens:,} tokens")


def _print_parts(out: Console, cost: Cost) -> None:
    table = Table("what", "ms", "of the step", "bound by", "GB", "TFLOP", box=None)
    for column in table.columns[1:3] + table.columns[4:]:
        column.justify = "right"
    for part in parts(cost)[:SHOWN]:
        table.add_row(
            part["what"], f"{part['seconds'] * 1e3:.2f}", f"{part['seconds'] / cost.seconds:.0%}", part["bound"],
            f"{part['bytes'] / 1e9:.2f}", f"{part['flops'] / 1e12:.3f}",
        )  # fmt: skip
    out.print(table)


def _print_collectives(out: Console, cost: Cost) -> None:
    rows = collectives(cost)
    if not rows:
        out.print("no collectives")
        return
    table = Table("collective", "what", "MB", "devices", "count", "ms", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row["kind"], row["what"], f"{row['bytes'] / 1e6:,.3f}", str(row["group"]), f"{row['count']:g}",
            f"{row['seconds'] * 1e3:.3f}",
        )  # fmt: skip
    out.print(table)


def parts(cost: Cost) -> list[dict[str, Any]]:
    """What a step does, by where it comes from in the traced program, longest first."""
    groups: dict[str, dict[str, Any]] = {}
    for op in cost.ops:
        name = f"{label(op.what)}{f' ({op.opcode})' if op.opcode not in ('fusion', 'custom-call') else ''}"
        one = groups.setdefault(name, {"what": name, "seconds": 0.0, "bytes": 0.0, "flops": 0.0, "sides": {}})
        one["seconds"] += op.total_s
        one["bytes"] += op.count * op.work.bytes
        one["flops"] += op.count * op.work.matmul
        one["sides"][op.bound] = one["sides"].get(op.bound, 0.0) + op.total_s
    for one in groups.values():
        sides = one.pop("sides")
        one["bound"] = max(sides, key=lambda side: sides[side])
    return sorted(groups.values(), key=lambda one: -one["seconds"])


def collectives(cost: Cost) -> list[dict[str, Any]]:
    """Every collective, those of one kind, origin and size together, longest first; `seconds` of all of them."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for op in cost.ops:
        if op.collective is None:
            continue
        found = op.collective
        key = (found.kind, label(op.what), found.bytes, found.group)
        one = groups.setdefault(
            key, dict(zip(("kind", "what", "bytes", "group"), key, strict=True)) | {"count": 0.0, "seconds": 0.0}
        )
        one["count"] += op.count
        one["seconds"] += op.count * found.seconds
    return sorted(groups.values(), key=lambda one: -one["seconds"])


def label(what: str) -> str:
    """The telling parts of an operation's name: `backward: bf,bd->fd/dot_general`."""
    first = re.split("[:;]", what)[0]  # operations that XLA joined are named one after another, in parentheses
    words = [word for word in (part.lstrip("(") for part in first.split("/")) if not _NOISE.match(word)]
    name = "/".join(words[-2:]) or "moving data"
    return f"backward: {name}" if "transpose(" in what else name


def _side(cost: Cost) -> str:
    sides: dict[str, float] = {}
    for op in cost.ops:
        sides[op.bound] = sides.get(op.bound, 0.0) + op.total_s
    side = max(sides, key=lambda name: sides[name])
    return f"{SIDES[side]} ({sides[side] / sum(sides.values()):.0%})"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)
