"""The methods of selection side by side on a finished run, with what synthesis reached there.

    python -m fac_jax.scale.select_table CONFIG [SOURCE ...]

Reads the run's scans (of SOURCE, by default the anchor), `coverage/missing.parquet`, `evaluation/coverage.json`; writes
nothing. Prints, for each SOURCE, how many of the missing features each method covers with so many documents, and their
tokens; then with as many documents and as many tokens as the kept samples of synthesis have. Random is a mean over
SEEDS.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
from jaxtyping import Bool

from fac_jax.config.coverage import SelectConfig
from fac_jax.config.file import Config, load_config
from fac_jax.coverage.choose import coverable
from fac_jax.coverage.pool import Pool, read_pool
from fac_jax.coverage.select import pick, target_features

BUDGETS = (5, 10, 25, 50)
SEEDS = range(20)
METHODS = get_args(get_type_hints(SelectConfig)["method"])


def main(arguments: Sequence[str]) -> None:
    """A table for each source."""
    config = load_config(arguments[0])
    run = Path(config.run.dir)
    inputs = {name: run / name for name in ("coverage", "relevance")}
    evaluated = json.loads((run / "evaluation/coverage.json").read_text(encoding="utf-8"))
    kept = evaluated["sets"]["kept"]
    settings = [SelectConfig(budget=budget) for budget in (*BUDGETS, kept["documents"])]
    settings.append(SelectConfig(budget=kept["tokens"], cost="tokens"))
    for source in arguments[1:] or (config.coverage.anchor,):
        folder = run / "scans" / source
        target_f = target_features(config, folder, inputs)
        pool = read_pool(folder, np.ones_like(target_f), config.coverage.threshold)
        within = int(np.count_nonzero(target_f & coverable(pool)))
        print(
            f"{source}: {len(pool.document_n):,} documents, {pool.tokens_n.sum():,} tokens, "
            f"{within:,} of {np.count_nonzero(target_f):,} missing features\n"
        )
        heads = [f"{one.budget:,} {one.cost}" for one in settings]
        print(f"| method | {' | '.join(heads)} |\n|---|{'---|' * len(settings)}")
        for method in METHODS:
            cells = (_cell(pool, target_f, dataclasses.replace(one, method=method)) for one in settings)
            print(f"| {method} | {' | '.join(cells)} |")
        print()
    _print_synthesis(config, evaluated)


def _cell(pool: Pool, target_f: Bool[np.ndarray, " f"], settings: SelectConfig) -> str:
    """Features covered and tokens taken."""
    if settings.method not in ("greed_select", "sim_scale"):
        pool = _only(pool, target_f)
    chosen = [pick(pool, target_f, settings, seed) for seed in (SEEDS if settings.method == "random" else (0,))]
    covered = np.mean([sum(len(one.features) for one in picks) for picks in chosen])
    tokens = np.mean([pool.tokens_n[[one.row for one in picks]].sum() for picks in chosen])
    return f"{covered:.1f} ({tokens:,.0f})" if settings.method == "random" else f"{covered:.0f} ({tokens:,.0f})"


def _only(pool: Pool, target_f: Bool[np.ndarray, " f"]) -> Pool:
    peaks = pool.peaks_nf.copy()
    peaks.data[~target_f[peaks.indices]] = 0
    peaks.eliminate_zeros()
    return dataclasses.replace(pool, peaks_nf=peaks)


def _print_synthesis(config: Config, evaluated: dict) -> None:
    for row in evaluated["rows"]:
        if row["threshold"] == config.coverage.threshold and row["set"] != "seed":
            found = evaluated["sets"][row["set"].removeprefix("seed+")]
            print(
                f"{row['set']}: {found['documents']:,} documents, {found['tokens']:,} tokens, target hit rate "
                f"{row['target_hit_rate']:.1%}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
