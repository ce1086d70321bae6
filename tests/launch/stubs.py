"""Stubs: programs, first on PATH, that record how they were called and do what a test wants."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path


class Stubs:
    """A folder of stub programs, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir()

    def add(self, name: str, body: str = "", reads_stdin: bool = False) -> None:
        """A Python program that records its arguments, then runs `body`, where `calls` is how often it was called."""
        record = self.folder / f"{name}.jsonl"
        program = f"""#!{sys.executable}
import json, os, signal, subprocess, sys, time
from pathlib import Path
record = Path({str(record)!r})
calls = len(record.read_text().splitlines()) + 1 if record.exists() else 1
stdin = sys.stdin.read() if {reads_stdin} else ""
with record.open("a") as file:
    file.write(json.dumps({{"argv": sys.argv[1:], "stdin": stdin}}) + "\\n")
{body}
"""
        write_program(self.folder / name, program)

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call."""
        return [call["argv"] for call in self._records(name)]

    def stdin(self, name: str) -> list[str]:
        """What each call read."""
        return [call["stdin"] for call in self._records(name)]

    def environment(self, **more: str) -> Mapping[str, str]:
        """The test's environment with the stubs first on PATH."""
        return {**os.environ, "PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}", **more}

    def _records(self, name: str) -> list[dict]:
        record = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def write_program(path: Path, text: str) -> None:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
