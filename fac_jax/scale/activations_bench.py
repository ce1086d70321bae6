"""`fac bench activations`: from text to training batches, each part beside what others use, in one run.

harvest: the conversations of a run file through its backbone into a store, beside the published code's loop (one
prompt at a time) and padded batches of transformers, which get the same token ids and compute in the same type.
Counted are real tokens, never padding. Weights are loaded and programs compiled before the clock starts; it stops when
the last file is closed. Our time includes reading, tokenizing and packing the text; the peers are given ids.

store: random rows to the disk (until they are there) and back in random order (from the page cache, which is warm),
beside raw arrays and the published code's files of 256 sequences. Raw arrays shuffle less or keep no origin and no
checksum: they are how fast the machine is, not alternatives.

Contenders run in processes of their own and in rounds (contest.py). Writes a table (activations_table.py), and JSON to
`--out`; the files in between are removed. Memory is the process's, or with `--device gpu` what the harvest took of
the GPU's.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from fac_jax.config.file import Config, load_config
from fac_jax.errors import UserError
from fac_jax.plain import suggest
from fac_jax.scale.contest import Device, Result, circumstances, run_json

PEERS = ("official", "hf_padded", "hf_sorted", "hf_sorted_cut")
UNWRITTEN = ", nothing written"
WARM_UP_DOCUMENTS = 8
LAYOUTS = {"store": ("raw", "stream"), "memmap": ("memmap_rows", "memmap_blocks"), "official": ("official",)}
"""Who reads what each writer wrote."""


@dataclass(frozen=True)
class ActivationsBench:
    """What to measure, and against whom."""

    parts: tuple[Literal["harvest", "store"], ...] = ("harvest", "store")
    """Which parts to measure."""
    device: Device = "cpu"
    """Where to harvest."""
    config: str = "configs/quickstart.yaml"
    """Run file whose backbone, layer and harvest.data are harvested."""
    documents: int = 64
    """Documents harvested, the first of the data set."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ()
    """Types to compute in, a ratio being always within one; by default float32, and bfloat16 where the hardware
    multiplies it."""
    geometries: tuple[str, ...] = ("8x512",)
    """Our batches: packed rows x tokens. The first is also run without writing anything."""
    peers: tuple[str, ...] = PEERS
    """Who harvests beside us: official (one prompt at a time), hf_padded (batches of 16, all layers), hf_sorted (by
    length), hf_sorted_cut (and without the layers above the one read)."""
    widths: tuple[int, ...] = (576, 4096)
    """Widths of the stored rows."""
    gib: float = 1.0
    """GiB of rows a width."""
    batch_rows: int = 4096
    """Rows of a training batch."""
    passes: int = 3
    """Times that all rows are read in a round."""
    peers_python: str = sys.executable
    """Python that has torch and transformers installed."""
    rounds: int = 2
    """Rounds; every contender runs once in each."""
    timeout_s: float = 1800.0
    """Seconds one contender may take for a round."""
    folder: str | None = None
    """Folder for the files in between; by default the system's for temporary files."""
    out: str | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        for name in ("documents", "gib", "batch_rows", "passes", "rounds", "timeout_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be more than 0")
        for peer in self.peers:
            if peer not in PEERS:
                raise UserError(f"peer {peer!r} is unknown{suggest(peer, PEERS)}; choose from {', '.join(PEERS)}")
        for text in self.geometries:
            read_geometry(text)
        if not self.geometries:
            raise UserError("nothing of ours would run: give --geometries at least one value")


def read_geometry(text: str) -> tuple[int, int]:
    """`8x512`. Raises UserError for anything else."""
    numbers = text.split("x")
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise UserError(f"geometry {text!r} must be packed rows x tokens, such as 8x512")
    return int(numbers[0]), int(numbers[1])


def measure(bench: ActivationsBench) -> dict[str, Any]:
    """Run all contenders of the parts asked for; the report as plain values."""
    report = circumstances("activations", bench)
    with TemporaryDirectory(prefix="fac-bench-", dir=bench.folder) as name:
        if "harvest" in bench.parts:
            report["harvest"] = measure_harvest(bench, Path(name))
        if "store" in bench.parts:
            report["store"] = [measure_store(bench, width, Path(name)) for width in bench.widths]
    return report


def measure_harvest(bench: ActivationsBench, folder: Path) -> dict[str, Any]:
    """Tokens a second of every contender and type."""
    # In a process of its own too: what this one holds would count as its children's peak memory.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        asked = pool.submit(prepare, load_config(bench.config), bench.documents, folder).result()
    cases = list(harvest_cases(bench, asked))
    results = [Result() for _ in cases]
    for index in range(bench.rounds):
        for case, result in zip(cases, results, strict=True):
            if result.absent is None:
                say(index, f"harvest, {case['name']}, {case['dtype']}")
                with empty_folder(folder / "harvested") as made:
                    parts = index == bench.rounds - 1
                    result.add(_checked(_ask(bench, {**case, "folder": str(made), "parts": parts}), asked["rows"]))
    found = [
        {"contender": case["name"], "dtype": case["dtype"], "result": result}
        for case, result in zip(cases, results, strict=True)
    ]
    return {
        "documents": asked["count"],
        "tokens": asked["tokens"],
        "layer": asked["layer"],
        "rows": harvest_rows(found),
    }


def prepare(config: Config, count: int, folder: Path) -> dict[str, Any]:
    """Write the documents, their token ids and the model as a Hugging Face folder; returns what contenders are told."""
    from fac_jax.backbone.export import export_hf  # these load jax
    from fac_jax.backbone.weights import load_tokenizer
    from fac_jax.packing import encodable_documents, encode_all

    data, source = config.dataset(config.harvest.data), config.backbone.model
    tokenizer = load_tokenizer(source)
    documents = list(islice(encodable_documents(data, config.harvest.data, tokenizer), count))
    encoded = list(encode_all(documents, tokenizer, data.max_tokens))
    ids = {"ids": [one.ids.tolist() for one in encoded], "content": [one.content.tolist() for one in encoded]}
    (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    for name, chosen in (("documents", documents), ("warm_up", documents[:WARM_UP_DOCUMENTS])):
        lines = ({"messages": [{"role": turn.role, "content": turn.content} for turn in one.turns]} for one in chosen)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {
        "model": source,
        "hf_model": str(export_hf(source, folder / "model")) if source.endswith(".gguf") else source,
        "layer": config.backbone.layer,
        "max_tokens": data.max_tokens,
        "documents": str(folder / "documents.jsonl"),
        "warm_up": str(folder / "warm_up.jsonl"),
        "ids": str(folder / "ids.json"),
        "count": len(documents),
        "tokens": sum(len(one.ids) for one in encoded),
        "rows": sum(int(one.content.sum()) for one in encoded),
    }


def harvest_cases(bench: ActivationsBench, asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What each contender is asked, ours first."""
    from fac_jax.mesh import matmul_dtype  # it loads jax

    asked = {**asked, "device": bench.device}
    for dtype in bench.dtypes or dict.fromkeys(("float32", matmul_dtype(bench.device))):
        for geometry in bench.geometries:
            ours = {**asked, "part": "harvest", "program": "harvest_contender", "dtype": dtype, "geometry": geometry}
            yield {**ours, "name": f"fac_jax {geometry}", "writes": True}
            if geometry == bench.geometries[0]:
                yield {**ours, "name": f"fac_jax {geometry}{UNWRITTEN}", "writes": False}
        for peer in bench.peers:
            yield {**asked, "part": "harvest", "program": "torch", "name": peer, "contender": peer, "dtype": dtype}


def _checked(found: dict[str, Any], rows: int) -> dict[str, Any]:
    """A contender that did not keep every content token is not comparable."""
    if "absent" in found or found["rows"] == rows:
        return found
    return {"absent": f"it kept {found['rows']} content tokens of {rows}"}


def harvest_rows(found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per contender and type, fastest of a type first; ratios are to peers of the same type.

    The share of the writes is that of the fastest rounds: the difference is small, and what disturbs only adds.
    """
    found, table = list(found), []
    for dtype in dict.fromkeys(one["dtype"] for one in found):
        ran = {one["contender"]: one["result"] for one in found if one["dtype"] == dtype and not one["result"].absent}
        official = ran["official"].rate if "official" in ran else None
        padded = max((ran[name].rate for name in ("hf_padded", "hf_sorted") if name in ran), default=None)
        cut = ran["hf_sorted_cut"].rate if "hf_sorted_cut" in ran else None
        for name, result in sorted(ran.items(), key=lambda item: -item[1].rate):
            unwritten = ran.get(f"{name}{UNWRITTEN}")
            table.append(
                {
                    "contender": name,
                    "dtype": dtype,
                    "tokens_per_second": result.rate,
                    "to_official": result.rate / official if official else None,
                    "to_padded": result.rate / padded if padded else None,
                    "to_cut": result.rate / cut if cut else None,
                    "writes_share": 1 - min(unwritten.seconds) / min(result.seconds) if unwritten else None,
                    **_common(result),
                }
            )
    absent = [{**one, "absent": one["result"].absent} for one in found if one["result"].absent]
    return table + [{name: one[name] for name in ("contender", "dtype", "absent")} for one in absent]


def measure_store(bench: ActivationsBench, width: int, folder: Path) -> dict[str, Any]:
    """Rows a second of every writer and reader at one width."""
    rows = max(bench.batch_rows, int(bench.gib * 2**30 / (2 * width)))
    asked = {"d_model": width, "rows": rows, "batch_rows": bench.batch_rows, "passes": bench.passes}
    results = {("write", writer): Result() for writer in LAYOUTS}
    results |= {("read", reader): Result() for readers in LAYOUTS.values() for reader in readers}
    for index in range(bench.rounds):
        for writer, readers in LAYOUTS.items():
            with empty_folder(folder / "rows") as made:
                for part, name in (("write", writer), *(("read", reader) for reader in readers)):
                    result = results[part, name]
                    if result.absent is None:
                        say(index, f"{part} {width} wide, {name}")
                        program = "torch" if writer == "official" else "store_contender"
                        case = {**asked, "part": part, "program": program, "contender": name, "folder": str(made)}
                        written = results["write", writer].absent is None
                        result.add(_ask(bench, case) if written else {"absent": "its files could not be written"})
    return {"d_model": width, "rows": rows, "batch_rows": bench.batch_rows, "table": store_rows(results, 2 * width)}


def store_rows(results: Mapping[tuple[str, str], Result], row_bytes: int) -> list[dict[str, Any]]:
    """One row per writer and reader, fastest first; ratios of writers to our store, of readers to the raw blocks."""
    table = []
    for part, yardstick in (("write", "store"), ("read", "raw")):
        ran = {name: one for (kind, name), one in results.items() if kind == part and one.absent is None}
        base = ran[yardstick].rate if yardstick in ran else None
        for name, result in sorted(ran.items(), key=lambda item: -item[1].rate):
            table.append(
                {
                    "part": part,
                    "contender": name,
                    "rows_per_second": result.rate,
                    "gb_per_second": result.rate * row_bytes / 1e9,
                    f"to_{yardstick}": result.rate / base if base else None,
                    **_common(result),
                }
            )
    absent = ((key, one.absent) for key, one in results.items() if one.absent)
    return table + [{"part": part, "contender": name, "absent": why} for (part, name), why in absent]


def _common(result: Result) -> dict[str, Any]:
    return {
        "median_s": result.median_s,
        "least_s": min(result.seconds),
        "most_s": max(result.seconds),
        "peak_gib": result.peak_bytes / 2**30,
        "version": result.version,
        "parts": result.parts,
    }


def _ask(bench: ActivationsBench, case: dict[str, Any]) -> dict[str, Any]:
    """One contender, one round."""
    if case["program"] == "torch":
        program = [bench.peers_python, str(Path(__file__).with_name("torch_activations.py"))]
    else:
        program = [sys.executable, "-m", f"fac_jax.scale.{case['program']}"]
    return run_json([*program, json.dumps(case)], bench.timeout_s, bench.device)


@contextmanager
def empty_folder(folder: Path) -> Iterator[Path]:
    """An empty folder, which is removed afterwards."""
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def say(index: int, what: str) -> None:
    print(f"round {index + 1}: {what}", file=sys.stderr, flush=True)
