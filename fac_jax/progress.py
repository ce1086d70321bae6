"""A progress bar on everything that takes longer than a few seconds: rate, ETA, and on a log file a line now and then.

Writes to standard error only, so that a command's output can be piped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

from fac_jax.distributed import is_first

LOG_EVERY_S = 10.0


class Bar:
    """Counts `unit`s of one stage; `advance` may be called as often as one likes."""

    def __init__(self, name: str, total: float | None, unit: str, display: Progress | None) -> None:
        self.name, self.total, self.unit, self.display = name, total, unit, display
        self.done = 0.0
        self.started = self._logged = time.monotonic()
        self.task: TaskID | None = display.add_task(name, total=total, unit=unit, note="") if display else None

    def advance(self, count: float, note: str = "") -> None:
        """Add `count` units; `note` (such as "fvu 0.31") stands at the end of the line."""
        self.done += count
        if self.display is not None and self.task is not None:
            self.display.update(self.task, completed=self.done, note=note)
        elif is_first() and time.monotonic() - self._logged > LOG_EVERY_S:
            self._logged = time.monotonic()
            print(self.line(note), file=sys.stderr, flush=True)

    def rate(self) -> float:
        """Units a second since the bar was made."""
        return self.done / max(time.monotonic() - self.started, 1e-9)

    def line(self, note: str = "") -> str:
        """One line for logs: `harvest  120,000/200,000 tokens  1,950 tokens/s  ETA 41 s`."""
        of = f"/{self.total:,.0f}" if self.total else ""
        eta = ""
        if self.total and self.done:
            eta = f"  ETA {max(self.total - self.done, 0) / self.rate():,.0f} s"
        speed = f"{rate_text(self.rate())} {self.unit}/s"
        return f"{self.name}  {self.done:,.0f}{of} {self.unit}  {speed}{eta}  {note}".rstrip()


def rate_text(rate: float) -> str:
    """A rate with two digits at least: `1,950`, `12`, `0.35`."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


class _Rate(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{rate_text(speed)} {task.fields['unit']}/s" if speed else "", style="cyan")


@contextmanager
def progress(name: str, total: float | None, unit: str) -> Iterator[Bar]:
    """`with progress("harvest", total=200_000, unit="tokens") as bar: bar.advance(n)`."""
    if not sys.stderr.isatty() or not is_first():
        yield Bar(name, total, unit, None)
        return
    columns = (
        TextColumn("{task.description:<12}"), BarColumn(bar_width=28), MofNCompleteColumn(), _Rate(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as display:
        yield Bar(name, total, unit, display)


class StatusLine:
    """What a wait without a known end is at: `say` for what happens once, `update` for how it goes."""

    def __init__(self, console: Console, display: Status | None) -> None:
        self._console, self._display = console, display
        self._logged = time.monotonic()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)
        if self._display is not None:
            self._display.update(escape(text))

    def update(self, text: str) -> None:
        """A line that the next one replaces; without a terminal, one now and then."""
        if self._display is not None:
            self._display.update(escape(text))
        elif time.monotonic() - self._logged > LOG_EVERY_S:
            self._logged = time.monotonic()
            self._console.print(text, markup=False)


@contextmanager
def status_line() -> Iterator[StatusLine]:
    """`with status_line() as line: line.update("waiting: 3 s")`."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not sys.stderr.isatty():
        yield StatusLine(console, None)
        return
    with console.status("") as display:
        yield StatusLine(console, display)
