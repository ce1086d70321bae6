"""`fac bench`: what was built here beside what others use, measured in one run.

    fac bench sae             the training step, beside published ones and the floor below which no step can go
    fac bench activations     harvest, store and stream, beside transformers, files of torch.save and raw arrays
    fac bench scan            a corpus scanned for what activates each feature, beside the published way and delphi

All run on the CPU, or with `--device gpu` on a GPU, print a table, and write JSON to `--out`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from fac_jax.config.checks import check_output
from fac_jax.errors import UserError
from fac_jax.plain import suggest
from fac_jax.runs import write_text
from fac_jax.scale import activations_bench, activations_table, sae_bench, scan_bench

BENCHES: dict[str, tuple[type, Any, Callable[[Any], dict[str, Any]], Callable[[Any], None]]] = {
    "sae": (sae_bench.Bench, sae_bench, sae_bench.measure, sae_bench.print_report),
    "activations": (
        activations_bench.ActivationsBench,
        *(activations_bench, activations_bench.measure, activations_table.print_report),
    ),
    "scan": (scan_bench.ScanBench, scan_bench, scan_bench.measure, scan_bench.print_report),
}
"""Settings, the module that says what it is, what measures, and what prints."""


def main(arguments: Sequence[str]) -> int:
    """`fac bench sae|activations|scan [--flag value ...]`; returns the exit status."""
    what, *flags = arguments if arguments else ("",)
    if what in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0
    if what not in BENCHES:
        names = " or ".join(map(repr, BENCHES))
        raise UserError(f"fac bench measures {names}, not {what!r}{suggest(what, BENCHES)}: run `fac bench sae`")
    settings, module, measure, print_report = BENCHES[what]
    description = (module.__doc__ or "").partition("\n\n")[2]
    bench: Any = tyro.cli(settings, prog=f"fac bench {what}", description=description, args=flags)
    if bench.out is not None:
        check_output("--out", bench.out)
    report = measure(bench)
    print_report(report)
    if bench.out is not None:
        write_text(Path(bench.out), json.dumps(report, indent=1) + "\n")
    return 0
