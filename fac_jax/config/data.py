"""`data.NAME`: files, which of their rows are taken, and how their text is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fac_jax.config.checks import check


@dataclass(frozen=True)
class Source:
    """Files of one kind, and which of their rows are taken."""

    path: str
    """File, glob, or pkg://PACKAGE/GLOB inside an installed package; s3://BUCKET/GLOB, gs://BUCKET/GLOB, or
    hf://datasets/OWNER/NAME[@REVISION][/GLOB]."""
    format: Literal["auto", "jsonl", "json", "csv", "tsv", "parquet", "txt", "chitchat"] = "auto"
    """How the file is read; auto goes by its ending (.gz and .zst are opened)."""
    text: str = "text"
    """Field with the user's text, or with a list of {role, content} messages."""
    label: str | None = None
    """Field with the label (true/false or a number; above 0.5 is positive)."""
    constant_label: float | None = None
    """Label of every row of this source, where the files have none."""
    skip_lines: int = 0
    """Lines skipped at the head of each file (csv and tsv)."""
    split: tuple[float, float] = (0.0, 1.0)
    """Rows whose hash of the document id, in [0, 1), lies in [low, high): fixed by content, not by order."""
    limit: int | None = None
    """Documents taken from this source, at most."""

    def __post_init__(self) -> None:
        low, high = self.split
        check(0 <= low < high <= 1, f"split is {self.split} for {self.path}; it must be 0 <= low < high <= 1")
        check(
            self.label is None or self.constant_label is None,
            f"{self.path} has both label: {self.label} and constant_label: {self.constant_label}; keep one",
        )


@dataclass(frozen=True)
class DataSet:
    """Documents from one or more sources."""

    sources: tuple[Source, ...] = ()
    """Where the documents come from, in this order."""
    without: tuple[Source, ...] = ()
    """Documents of these sources are left out, in whatever case and punctuation: what is held out must not be trained
    on. Their words are held in memory."""
    unique: bool = True
    """A document seen twice counts once. Its id is remembered for it, 0.1 GB a million documents; false for a corpus of
    any size that holds none twice: memory then does not depend on it."""
    sample: float = 1.0
    """Fraction of the documents kept, chosen by hash of the document id (paper: seed = a 10% subset)."""
    max_tokens: int = 256
    """Tokens of a document, template included, that are kept (code: 286 for Llama, 256 for others)."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A malformed row stops the run with its file and line, or is counted, listed and skipped."""

    def __post_init__(self) -> None:
        check(0 < self.sample <= 1, f"sample is {self.sample}; it must lie in (0, 1]")
        check(self.max_tokens >= 8, f"max_tokens is {self.max_tokens}; it must be at least 8")
