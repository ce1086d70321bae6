"""What `fac bench activations` prints: its tables, and what was aimed at beside what came out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from fac_jax.scale.contest import print_circumstances

OURS = "fac_jax"
LABELS = {
    "official": "official way",
    "hf_padded": "transformers, padded",
    "hf_sorted": "transformers, sorted",
    "hf_sorted_cut": "transformers, sorted, cut",
}
HARVEST_NOTE = (
    "official way: one prompt at a time through the whole model. transformers: padded batches of 16 through all "
    "layers, as they come or sorted by length; cut: without the layers above the one that is read."
)
STORE_LABELS = {
    ("write", "store"): "our store (shuffled, checksums)",
    ("write", "memmap"): "one raw file (memmap)",
    ("write", "official"): "official layout (torch.save of 256 sequences)",
    ("read", "raw"): "our store, random blocks, not mixed",
    ("read", "stream"): "our stream: shuffled training batches",
    ("read", "memmap_rows"): "memmap, random rows",
    ("read", "memmap_blocks"): "memmap, random blocks, not mixed",
    ("read", "official"): "official layout, shuffled within a file",
}


@dataclass(frozen=True)
class Goal:
    """A number that was aimed at, and the one that was measured."""

    text: str
    """`{}` is where the number stands."""
    found: float
    goal: float
    percent: bool = False
    at_most: bool = False

    def line(self) -> str:
        """For people."""
        found, goal = (f"{one:.1%}" if self.percent else f"{one:.2f}x" for one in (self.found, self.goal))
        reached = self.found <= self.goal if self.at_most else self.found >= self.goal
        bound = "at most" if self.at_most else "at least"
        return f"{'reached' if reached else 'missed '}  {self.text.format(found)} (goal: {bound} {goal})"


def print_report(report: Mapping[str, Any]) -> None:
    """The tables, for people."""
    console = print_circumstances(report)
    tables = [(_harvest_title(report), *_harvest_table(report["harvest"]["rows"]))] if "harvest" in report else []
    tables += [(_store_title(one), *_store_table(one["table"])) for one in report.get("store", [])]
    for title, table, notes in tables:
        console.print(f"\n{title}")
        console.print(table)
        for note in notes:
            console.print(note)
    console.print()
    for goal in goals(report):
        console.print(goal.line())


def goals(report: Mapping[str, Any]) -> Iterator[Goal]:
    """Every goal that this report can speak to: our fastest geometry of each type, and each width."""
    rows = [row for row in report.get("harvest", {}).get("rows", []) if "absent" not in row]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        ours = [row for row in rows if row["dtype"] == dtype and row["contender"].startswith(OURS)]
        best = next((row for row in ours if "nothing" not in row["contender"]), None)
        if best is not None:
            what = f"{best['contender']} in {dtype} harvests at {{}} "
            if best["to_official"]:
                yield Goal(what + "the rate of the official way", best["to_official"], 3)
            if best["to_padded"]:
                yield Goal(what + "that of transformers' padded batches, all layers", best["to_padded"], 1)
        share = next((row["writes_share"] for row in ours if row["writes_share"] is not None), None)
        if share is not None:
            yield Goal(f"in {dtype} {{}} of the time goes into writing", share, 0.1, percent=True, at_most=True)
    for one in report.get("store", []):
        rates = {
            row["contender"]: row["rows_per_second"]
            for row in one["table"]
            if row["part"] == "read" and "absent" not in row
        }
        for name, goal, percent, text in (
            ("raw", 0.85, True, "of the raw blocks' rate"),
            ("official", 3, False, "the rate of the official layout"),
        ):
            if "stream" in rates and name in rates:
                what = f"{one['d_model']:,} wide, the stream gives rows at {{}} {text}"
                yield Goal(what, rates["stream"] / rates[name], goal, percent)


def _harvest_title(report: Mapping[str, Any]) -> str:
    found = report["harvest"]
    config, layer = report["bench"]["config"], found["layer"]
    return f"harvest of {config}, layer {layer}: {found['documents']} documents, {found['tokens']:,} real tokens"


def _harvest_table(rows: Sequence[Mapping[str, Any]]) -> tuple[Table, list[str]]:
    table = _table("harvest", "type", "tokens/s", "s (min-max)", "to official", "to padded", "to cut", "peak GiB")
    notes = [HARVEST_NOTE]
    for row in rows:
        label = LABELS.get(row["contender"], row["contender"])
        if "absent" in row:
            notes.append(f"{label}, {row['dtype']}: not measured, {row['absent']}")
            continue
        ratios = (_ratio(row[name]) for name in ("to_official", "to_padded", "to_cut"))
        rate = f"{row['tokens_per_second']:,.0f}"
        table.add_row(label, row["dtype"], rate, _range(row), *ratios, f"{row['peak_gib']:.1f}")
        if row["parts"]:
            parts = (
                f"{name} {seconds:.2f} s ({seconds / row['median_s']:.1%})" for name, seconds in row["parts"].items()
            )
            notes.append(f"{label}, {row['dtype']}, each part alone: {', '.join(parts)}")
    return table, notes


def _store_title(one: Mapping[str, Any]) -> str:
    size = one["rows"] * one["d_model"] * 2 / 2**30
    return (
        f"{one['d_model']:,} wide: {one['rows']:,} rows, {size:.2f} GiB; written until they are on the disk, read from "
        f"a warm page cache, in batches of {one['batch_rows']:,}"
    )


def _store_table(rows: Sequence[Mapping[str, Any]]) -> tuple[Table, list[str]]:
    table = _table("store", "", "rows/s", "GB/s", "s (min-max)", "ratio", "peak GiB")
    notes = []
    for row in rows:
        label = STORE_LABELS[row["part"], row["contender"]]
        if "absent" in row:
            notes.append(f"{row['part']}, {label}: not measured, {row['absent']}")
            continue
        ratio = _ratio(row["to_store"] if row["part"] == "write" else row["to_raw"])
        cells = f"{row['rows_per_second']:,.0f}", f"{row['gb_per_second']:.2f}", _range(row), ratio
        table.add_row(label, row["part"], *cells, f"{row['peak_gib']:.1f}")
    return table, notes


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    return table


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _range(row: Mapping[str, Any]) -> str:
    return f"{row['median_s']:.2f} ({row['least_s']:.2f}-{row['most_s']:.2f})"
