"""Why a product is outdated, for `fac status`: which of its settings changed since, or which of its inputs did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fac_jax.errors import UserError
from fac_jax.plain import to_plain
from fac_jax.runs import Record, Run, Stage

MOST = 5
"""Settings named of a stage."""
LONGEST = 40
"""Characters of a value."""


def changes(run: Run, stage: Stage, record: Record, stages: Mapping[str, Stage]) -> str:
    """What of an outdated product's settings changed, with both values; where none did, what of its inputs; or why it
    cannot be told."""
    try:
        if settings := _settings(record.settings, to_plain(stage.settings)):
            more = [f"{len(settings) - MOST} more settings changed"] if len(settings) > MOST else []
            return "; ".join([*settings[:MOST], *more])
        owners = dict.fromkeys(name.partition("/")[0] for name in stage.inputs)
        states = {name: run.state(stages[name], stages)[0] for name in owners}
        if waiting := [f"{name} is {state}" for name, state in states.items() if state != "done"]:
            return f"of its inputs {', '.join(waiting)}"
        inputs = run.input_digests(stage, stages)
    except UserError as error:  # files of a data set that have gone, a product that is damaged
        return str(error)
    differ = [name for name in {**record.inputs, **inputs} if record.inputs.get(name) != inputs.get(name)]
    return f"its inputs changed: {', '.join(differ)}" if differ else "it was made by another version of fac_jax"


def _settings(before: Any, now: Any) -> list[str]:
    """A phrase for each setting that differs."""
    old, new = _leaves(before), _leaves(now)
    phrases = []
    for name in {**old, **new}:
        if name not in new:
            phrases.append(f"{name} is gone")
        elif name not in old:
            phrases.append(f"{name} is new")
        elif old[name] != new[name]:
            was, is_now = _short(old[name]), _short(new[name])
            phrases.append(f"{name} was {was}, is {is_now}" if was != is_now else f"{name} changed")
    return phrases


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Settings by their dotted name, as flags have it; a list of plain values is one setting."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: leaf for part, item in value.items() for key, leaf in _leaves(item, f"{name}.{part}".lstrip(".")).items()
    }


def _short(value: Any) -> str:
    said = json.dumps(value, ensure_ascii=False).removesuffix(".0")
    return said if len(said) <= LONGEST else f"{said[: LONGEST - 1]}…"
