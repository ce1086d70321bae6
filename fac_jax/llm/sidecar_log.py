"""What a server's log says, in one line: where it is, or why it died.

Reads the last part of a log that servers, their worker processes and Python's tracebacks have written in turns.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

TAIL_BYTES = 256 * 1024
COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
PREFIX = re.compile(r"^(\(\w+ pid=\d+\)\s*)?(((DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+)?[\d-]+ [\d:.,]+ \[[^\]]*\]\s*)?")
"""What vLLM writes before a line: process, level, time and place."""
SAYS_WHY = re.compile(r"^([\w.]+(Error|Exception|Exit)\b\s*:|error:)|No module named|out of memory", re.IGNORECASE)
NO_CAUSE = re.compile(r"root cause above|see stack trace|cancelled", re.IGNORECASE)
"""Errors about other errors, which stand above them."""


def last_line(log: Path, characters: int = 100) -> str:
    """The last line that says anything, cut."""
    lines = _lines(log)
    return lines[-1][:characters] if lines else "nothing yet"


def cause(log: Path, characters: int = 300) -> str:
    """The line that says why a server died: the last error that is not about another error, or the last line."""
    lines = _lines(log)
    errors = [line for line in lines if SAYS_WHY.search(line) and not NO_CAUSE.search(line)]
    return (errors or lines or ["its log is empty"])[-1][:characters]


def _lines(log: Path) -> list[str]:
    try:
        with open(log, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    # A bar that is drawn again and again ends its lines with carriage returns; the last drawing counts.
    drawn = (line.rstrip().rsplit("\r", 1)[-1] for line in COLOUR.sub("", text).split("\n"))
    plain = (PREFIX.sub("", line, count=1).strip() for line in drawn)
    return [line for line in plain if any(character.isalnum() for character in line)]
