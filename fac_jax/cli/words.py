"""Commands that read no config: `fac store`, `fac bench`, `fac scan merge`, `fac coverage SCAN --vs SCAN`."""

from __future__ import annotations

import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fac_jax.cli.options import take_options
from fac_jax.errors import UserError
from fac_jax.plain import suggest


def run(verb: str, rest: list[str]) -> int | None:
    """The exit status, where the words behind the verb are one of these commands; else None, and nothing is done."""
    if verb == "store":
        return _store(rest)
    if verb == "bench":
        from fac_jax.scale.bench import main

        return main(rest)
    if verb == "scan" and rest[:1] == ["merge"]:
        return _merge_scans(rest[1:])
    if verb == "coverage" and any(word.partition("=")[0] == "--vs" for word in rest):
        return _compare(rest)
    return None


STORE_USAGE = """usage: fac store info PATH                what the store (or stores) at PATH, a folder or URL, holds
       fac store verify PATH              read every block; name and quarantine the damaged ones (then the status is 1)
       fac store merge INTO PATH PATH...  a store of the rows of several, which stay where they are
       fac store drop PATH WRITER         delete what one writer (such as p0001) wrote"""


def _store(arguments: list[str]) -> int:
    """Look after activation stores; returns the exit status."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(STORE_USAGE)
        return 0 if arguments else 2
    action, *paths = arguments
    numbers = {"info": (1, 1), "verify": (1, 1), "merge": (3, 10**6), "drop": (2, 2)}
    if action not in numbers:
        raise UserError(f"fac store has no {action!r}{suggest(action, numbers)}\n{STORE_USAGE}")
    least, most = numbers[action]
    if not least <= len(paths) <= most or any(path.startswith("-") for path in paths):
        raise UserError(f"`fac store {' '.join(arguments)}` has too few or too many words\n{STORE_USAGE}")
    from fac_jax.activations import upkeep

    if action == "verify":
        found = upkeep.verify(paths[0])
        for line in [*found, *(upkeep.remedies(found) if found else ["every block is whole"])]:
            print(line)
        return 1 if found else 0
    if action == "info":
        lines = upkeep.info(paths[0])
    else:
        lines = upkeep.merge(paths[0], paths[1:]) if action == "merge" else upkeep.drop(*paths)
    print("\n".join(lines))
    return 0


MERGE_USAGE = """usage: fac scan merge INTO FROM FROM...   one scan, in the new folder INTO, of several

Each FROM is a scan's folder, such as runs/quickstart/scans/anchor: finished scans of different data sets, made with the
same model and SAE; or the shares of one data set that --scan.share made in several run directories."""


def _merge_scans(arguments: list[str]) -> int:
    """Scans to one scan; returns the exit status."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(MERGE_USAGE)
        return 0 if arguments else 2
    into, *folders = arguments
    if not folders or any(word.startswith("-") for word in arguments):
        raise UserError(f"`fac scan merge {' '.join(arguments)}` has too few words, or flags\n{MERGE_USAGE}")

    from fac_jax.scan.merge import merge_scans

    _make_folder(Path(into).parent)
    counts = merge_scans(Path(into), [Path(folder) for folder in folders])
    print(f"{into}: {counts['documents']:,} documents, {counts['active_features']:,} active features")
    return 0


COMPARE_USAGE = "usage: fac coverage SCAN_A --vs SCAN_B"
COMPARE = {
    "vs": "SCAN: folder of a finished scan, such as runs/quickstart/scans/anchor, as SCAN_A is",
    "threshold": "NUMBER: a feature is covered when its peak exceeds it (default: coverage.threshold of the scans' "
    "runs, or its own default where no run holds them)",
    "relevance": "FOLDER: a relevance product: only the features that it calls relevant count (default: all)",
    "spans": "N: passages kept of each feature (default: 3)",
    "out": "FOLDER: compare.json, compare.parquet (every feature) and compare.svg are written there",
    "show-unsafe": "print passages, which may be harmful",
}


def _compare(arguments: list[str]) -> int:
    """What either of two scans covers that the other does not; returns the exit status."""
    rest = list(arguments)
    if "-h" in rest or "--help" in rest:
        print(COMPARE_USAGE + "".join(f"\n  --{name} {text}" for name, text in COMPARE.items()))
        return 0
    options = take_options(rest, COMPARE)
    if len(rest) != 1 or rest[0].startswith("-"):
        raise UserError(f"`fac coverage {' '.join(arguments)}` needs one scan beside --vs: {COMPARE_USAGE} --help")

    from fac_jax.coverage import compare as module

    scans = Path(rest[0]), Path(options["vs"])
    try:
        threshold = float(options["threshold"]) if "threshold" in options else _own_threshold(scans)
        spans = int(options.get("spans", 3))
    except ValueError as error:
        raise UserError(f"--threshold and --spans must be numbers ({error})") from None
    relevance = Path(options["relevance"]) if "relevance" in options else None
    if "out" in options:
        _make_folder(Path(options["out"]))
    figures, table = module.compare(*scans, threshold, relevance, spans)
    Console(width=None if sys.stdout.isatty() else 120).print(module.printed(figures, table, "show-unsafe" in options))
    if "out" in options:
        module.write(Path(options["out"]), figures, table)
        (Path(options["out"]) / "compare.svg").write_text(_curves(figures), encoding="utf-8")
        print(f"written: {options['out']}/compare.json, compare.parquet, compare.svg")
    return 0


def _own_threshold(scans: Sequence[Path]) -> float:
    """`coverage.threshold` of the runs that hold the scans, and a line that says so. Raises UserError when they differ.

    A scan that no run holds, such as one that was merged, has none of its own.
    """
    from fac_jax.config.coverage import CoverageConfig
    from fac_jax.config.file import load_config

    places = [scan.resolve().parent for scan in scans]
    files = [place.parent / "config.yaml" for place in places if place.name == "scans"]
    found = {file: load_config(file).coverage.threshold for file in files if file.is_file()}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{value:g} in {file}" for file, value in found.items())
        raise UserError(f"coverage.threshold is {said}: say at which to compare, with --threshold")
    threshold = next(iter(found.values()), CoverageConfig.threshold)
    where = f"in {next(iter(found))}" if found else "by default, as no run holds these scans"
    print(f"threshold {threshold:g}: coverage.threshold {where}; --threshold takes another")
    return threshold


def _make_folder(folder: Path) -> None:
    """A folder that will be written to, made before the work. Raises UserError where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made a folder ({error.strerror}); name another one") from None


def _curves(figures: dict[str, typing.Any]) -> str:
    """Both sets' coverage against how much text was taken, as SVG."""
    import math

    from fac_jax.report.figures import Series, line_figure, standalone

    series = []
    for colour, (side, curve) in enumerate(zip("ab", figures["curves"], strict=True), 1):
        points = [(math.log10(max(t, 1)), c) for t, c in zip(curve["content_tokens"], curve["covered"], strict=True)]
        series.append(Series(figures[side]["name"], points, colour))
    title = f"Features covered, expected (peaks above {figures['threshold']:g})"
    return standalone(line_figure(title, series, "content tokens, powers of ten", from_zero=True))
