"""How long selection takes, and how much memory, on a scan of a million documents.

    python -m fac_jax.scale.select_bench [DOCUMENTS [FEATURES [FOLDER]]]

Writes a made-up scan below FOLDER (a temporary folder by default; 1.6 GB for 1,000,000 documents and 65,536 features,
deleted afterwards), then runs the stage in a process of its own for each line of CASES. Prints a table in Markdown:
seconds and the highest resident memory (ru_maxrss) of all that `fac select` does, reading and writing included.

Documents have 80 peaks above the threshold on average, and as many below, a few on features that are everywhere and
most in the long tail: half of a document's draws are from all features by rank^-0.8, half from the 512 of one of 997
topics by rank^-1; lengths are log-normal, and long documents have more features.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fac_jax.config.coverage import CoverageConfig, SelectConfig
from fac_jax.config.file import Config
from fac_jax.coverage.select import select
from fac_jax.scan.parts import Identity
from fac_jax.scan.tables import DOCUMENTS, DOCUMENTS_PER_GROUP, PEAKS, PEAKS_PER_GROUP

THRESHOLD = 1.0
TOPICS, TOPIC_FEATURES = 997, 512
CASES = (
    SelectConfig(),
    SelectConfig(target="all"),
    SelectConfig(target="all", budget=100_000, cost="tokens"),
    SelectConfig(method="magnitude"),
    SelectConfig(method="magnitude", target="all"),
    SelectConfig(method="greed_select", target="all", budget=10_000),
    SelectConfig(method="sim_scale", target="all", budget=10_000),
    SelectConfig(method="random", target="all", budget=10_000),
)


def main(arguments: list[str]) -> None:
    """The table. Writing the scan and each line of the table are processes of their own, called with --write and --one:
    a process counts the memory of the one that started it, which therefore holds nothing."""
    if arguments[:1] == ["--write"]:
        print(json.dumps(write_scan(Path(arguments[1]), int(arguments[2]), int(arguments[3]))))
        return
    if arguments[:1] == ["--one"]:
        print(json.dumps(measure(Path(arguments[1]), CASES[int(arguments[2])])))
        return
    documents, features = (int(word) for word in (*arguments[:2], *("1000000", "65536")[len(arguments[:2]) :]))
    with tempfile.TemporaryDirectory(dir=arguments[2] if len(arguments) > 2 else None) as name:
        began = time.perf_counter()
        peaks, above = _own_process("--write", name, str(documents), str(features))
        seconds = time.perf_counter() - began
        gigabytes = (Path(name) / "scan/peaks.parquet").stat().st_size / 1e9
        print(
            f"{documents:,} documents, {features:,} features, {peaks:,} peaks, {above / documents:.1f} a document "
            f"above the threshold, {gigabytes:.1f} GB, made in {seconds:.0f} s\n"
        )
        print(
            "| method | target | budget | documents | covered | of | s | peak GB |\n|---|---|---|---|---|---|---|---|"
        )
        for index, case in enumerate(CASES):
            found = _own_process("--one", name, str(index))
            budget = "none" if case.budget is None else f"{case.budget:,} {case.cost}"
            counts = " | ".join(f"{found[key]:,}" for key in ("documents", "covered", "coverable"))
            measured = f"{found['seconds']:.0f} | {found['gb']:.1f}"
            print(f"| {case.method} | {case.target} | {budget} | {counts} | {measured} |", flush=True)


def _own_process(*arguments: str) -> Any:
    command = [sys.executable, "-m", "fac_jax.scale.select_bench", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(folder: Path, case: SelectConfig) -> dict[str, float]:
    """The stage's summary, with its seconds and this process's highest memory."""
    out = folder / "out"
    out.mkdir(exist_ok=True)
    config = Config(coverage=CoverageConfig(threshold=THRESHOLD), select=case)
    began = time.perf_counter()
    found = select(config, out, {"scan:anchor": folder / "scan", "coverage": folder / "coverage"})
    seconds = time.perf_counter() - began
    return {**found, "seconds": seconds, "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def write_scan(folder: Path, documents: int, features: int) -> tuple[int, int]:
    """A scan in `scan` and a tenth of its features as missing in `coverage`; how many peaks, and how many count."""
    generator = np.random.default_rng(0)
    (folder / "scan").mkdir()
    (folder / "coverage").mkdir()
    peaks = above = 0
    with (
        pq.ParquetWriter(folder / "scan/peaks.parquet", PEAKS, compression="zstd") as peak_file,
        pq.ParquetWriter(folder / "scan/documents.parquet", DOCUMENTS, compression="zstd") as document_file,
    ):
        held = PEAKS.empty_table()
        for first, ids, tokens_n, document, feature, peak in _batches(generator, documents, features):
            peaks, above = peaks + len(peak), above + int(np.count_nonzero(peak > THRESHOLD))
            document_file.write_table(_documents(first, ids, tokens_n), DOCUMENTS_PER_GROUP)
            columns = {
                "document": first + document, "document_id": ids.take(pa.array(document)), "feature": feature,
                "peak": peak, "position": generator.integers(0, tokens_n[document]),
                "token_id": generator.integers(0, 50_000, len(peak)),
            }  # fmt: skip
            held = pa.concat_tables([held, pa.table(columns).cast(PEAKS)])
            while held.num_rows >= PEAKS_PER_GROUP:
                peak_file.write_table(held.slice(0, PEAKS_PER_GROUP).combine_chunks())
                held = held.slice(PEAKS_PER_GROUP)
        peak_file.write_table(held.combine_chunks())
    missing = np.sort(generator.choice(features, features // 10, replace=False)).astype(np.int32)
    pq.write_table(pa.table({"feature": missing}), folder / "coverage/missing.parquet")
    (folder / "coverage/coverage.json").write_text(json.dumps({"sae": "made-up"}))
    identity = Identity("anchor", "made-up", "made-up", 16, "made-up", features, 20, "topk", 10, 32, "all")
    product = {"identity": dataclasses.asdict(identity), "counts": {"documents": documents, "peaks": peaks}}
    (folder / "scan/scan.json").write_text(json.dumps(product))
    return peaks, above


def _batches(
    generator: np.random.Generator, documents: int, features: int
) -> Iterator[tuple[int, pa.Array, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """First document, ids, lengths; and document (from 0), feature and height of each peak, in order."""
    order = generator.permutation(features)
    everywhere, topical = (_cumulative(count, power) for count, power in ((features, 0.8), (TOPIC_FEATURES, 1.0)))
    scale_f = generator.lognormal(0, 0.3, features).astype(np.float32)
    for first in range(0, documents, DOCUMENTS_PER_GROUP):
        count = min(DOCUMENTS_PER_GROUP, documents - first)
        ids = pa.array([f"{number:016x}" for number in generator.integers(0, 2**63, count).tolist()])
        tokens_n = np.clip(generator.lognormal(4.6, 0.8, count), 5, 2_000).astype(np.int32)
        drawn_n = np.clip(20 * np.sqrt(tokens_n), 10, 600).astype(np.int64)
        document = np.repeat(np.arange(count), drawn_n)
        topic_n = generator.integers(0, TOPICS, count)
        rank = np.searchsorted(everywhere, generator.random(len(document)))
        inside = np.searchsorted(topical, generator.random(len(document)))
        block = (topic_n[document] * (features // TOPICS + 1) + inside) % features
        feature = order[np.where(generator.random(len(document)) < 0.5, rank, block)]
        pairs = np.unique(document * features + feature)
        document, feature = pairs // features, (pairs % features).astype(np.int32)
        yield (
            first,
            ids,
            tokens_n,
            document,
            feature,
            scale_f[feature] * generator.lognormal(0, 0.5, len(pairs)).astype(np.float32),
        )


def _cumulative(count: int, power: float) -> np.ndarray:
    """Cumulative probabilities of ranks that are drawn by rank^-power."""
    summed = np.cumsum(np.arange(1, count + 1) ** -power)
    return summed / summed[-1]


def _documents(first: int, ids: pa.Array, tokens_n: np.ndarray) -> pa.Table:
    texts = [f"document {first + place} " * (tokens // 2) for place, tokens in enumerate(tokens_n.tolist())]
    columns = {
        "index": np.arange(first, first + len(ids)), "id": ids, "label": np.zeros(len(ids), np.float32),
        "turns": [[{"role": "user", "content": text}] for text in texts], "text": texts,
        "tokens": tokens_n, "content_tokens": tokens_n,
    }  # fmt: skip
    absent = {field.name: pa.nulls(len(ids), field.type) for field in DOCUMENTS if field.name not in columns}
    return pa.table({name: {**columns, **absent}[name] for name in DOCUMENTS.names}).cast(DOCUMENTS)


if __name__ == "__main__":
    main(sys.argv[1:])
