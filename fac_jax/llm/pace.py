"""How many requests are in flight, and how fast new ones are sent: as much as the server takes, and no more.

Two limits, both learned. *Concurrency* starts at 4 and grows while answers come in good time; 503, timeouts and broken
connections shrink it, and it then comes back quickly to nine tenths of where it broke and slowly beyond. A *rate* is
set once a server answers 429, and each further 429 measures the server's allowance anew: it lies between what was
accepted since the last one, divided by the time, and the rate that was refused. (Many limiters go on counting while a
Retry-After binds everybody, so a rate that is refused soon after one may be far too high; one that is refused late is
not.) Sending goes on slightly below the allowance and creeps to slightly above, the slower the more a 429 costs.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections.abc import Callable

from fac_jax.llm.exchange import Outcome

FIRST, EASY = 4, 8
"""Requests in flight at the start; up to EASY each answer admits one more."""
GROWTH = 0.25
"""Of one request, for each answer above EASY: a quarter more every round trip."""
SHRINK, NEAR = 0.7, 0.9
"""On overload, of what was in flight; and the share of that point from which growth is slow."""
SLOW_ROUNDS = 8
"""Round trips per further request, near the point where it broke."""
BELOW, ABOVE = 0.97, 1.03
"""Of the measured allowance: where sending goes on after a 429, and where it has crept to when the next is expected."""
CYCLE_REQUESTS, CYCLE_PAUSES = 300, 20
"""A creep from BELOW to ABOVE takes so many requests, and so many times the last Retry-After, at least."""
HELD_S, DOUBLE_S, DOUBLE_REQUESTS = 2.0, 5.0, 60
"""While the allowance is not known: seconds of sending after which the rate grows, and seconds and requests, at least,
in which it then doubles."""
STEP = 1.25
"""Growth after which what was accepted at the lower rate says nothing of the higher one."""
AGREE = 1.3
"""Ratio of the refused rate to the accepted one below which the allowance is known."""
LONG = 3
"""Times the pause before it: an interval from which on what was saved up in the pause does not matter much."""
DROP = 0.7
"""Of the refused rate, at least, after a shorter one, while the allowance is not known."""
FEWEST = 5
"""Accepted requests from which a rate is measured."""
CREDIT_S = 0.05
"""Lateness that is caught up with, since timers wake late."""


class Pace:
    """Call `begin` before every try and `end` after it; both in one event loop."""

    def __init__(self, most: int, slow_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """At most `most` in flight; no growth while answers take longer than `slow_s`."""
        self.limit = float(min(FIRST, most))
        self.rate: float | None = None
        """Requests a second; None until the server has refused one."""
        self.in_flight = self.most_in_flight = 0
        self._most, self._slow_s, self._clock = most, slow_s, clock
        self._ceiling = math.inf
        self._refused_at = self._shrunk_at = clock()
        self._pause_s = 0.0  # as the last Retry-After had it
        self._paced = False
        self._not_before = self._next = -math.inf
        self._measured_from = self._grown_at = clock()
        self._accepted, self._paused_s, self._measured_rate, self._known = 0, 0.0, 0.0, False
        self._waiting: list[tuple[bool, int, asyncio.Future[None]]] = []
        self._over = False
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """A new event loop begins; what was learned stays, but the time in between measured nothing."""
        self._waiting, self._timer, self.in_flight, self._over = [], None, 0, False
        self._measure(self._clock(), self._known)

    def give_up(self) -> None:
        """Nothing more is sent: all that wait for a turn have it at once, and are to end it without sending."""
        self._over = True
        self._admit()

    async def begin(self, again: bool = False) -> float:
        """Wait for a turn (a request that is tried `again` goes first); returns the time of sending."""
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (not again, next(self._order), turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()
            raise
        return self._clock()

    def end(self, sent: float, outcome: Outcome | None, retry_after_s: float | None = None) -> None:
        """A try is over; outcome None: it was not sent after all."""
        now = self._clock()
        if retry_after_s is not None:
            self._pause_s = max(retry_after_s, 0.0)
            self._not_before = max(self._not_before, now + self._pause_s)
        if outcome == "refused":
            self._refused(sent, now)
        elif outcome == "overloaded":
            self._shrink(sent, now)
        elif outcome is not None:
            self._accept(now - sent if outcome == "answered" else math.inf)
        self._leave()

    def paused_s(self) -> float:
        """Seconds for which a Retry-After still binds everybody."""
        return max(0.0, self._not_before - self._clock())

    def _accept(self, seconds: float) -> None:
        self._accepted += 1
        if seconds <= self._slow_s and self.in_flight >= int(self.limit):
            near = self.limit + 1 > NEAR * self._ceiling
            growth = 1 / (SLOW_ROUNDS * self.limit) if near else 1.0 if self.limit < EASY else GROWTH
            self.limit = min(float(self._most), self.limit + growth)
            if self.limit > self._ceiling / NEAR:  # it holds where it broke before: that was another time
                self._ceiling = math.inf
        if self.rate is not None and self._paced:  # else something else holds us back, and the rate is not tried
            self._faster(self._clock())

    def _faster(self, now: float) -> None:
        assert self.rate is not None
        seconds, self._grown_at = min(now - self._grown_at, 1.0), now
        cycle_s = max(CYCLE_REQUESTS / self.rate, CYCLE_PAUSES * self._pause_s)
        sending_s = now - self._measured_from - self._paused_s
        if self._known and sending_s < 2 * cycle_s:
            self.rate *= (ABOVE / BELOW) ** (seconds / cycle_s)
        elif self._known or sending_s > max(HELD_S, LONG * self._paused_s):
            self.rate *= 2 ** (seconds / max(DOUBLE_S, DOUBLE_REQUESTS / self.rate))
            if self.rate > STEP * self._measured_rate:
                self._measure(now, known=False)

    def _refused(self, sent: float, now: float) -> None:
        if sent < self._refused_at:  # sent before what the last refusal taught: it says nothing new
            return
        elapsed = max(now - self._measured_from, 1e-3)
        mean = self._accepted / elapsed
        known = False
        if self.rate is None:
            self.rate = max(self._accepted, FEWEST) / elapsed
        elif elapsed - self._paused_s >= LONG * self._paused_s and self._accepted >= FEWEST:
            known = self.rate < AGREE * mean
            self.rate = BELOW * math.sqrt(min(mean, self.rate) * self.rate)
        else:
            known = self._known
            self.rate *= max(BELOW * min(mean / self.rate, 1.0), BELOW / ABOVE if known else DROP)
        self._refused_at = now
        self._measure(now, known)

    def _measure(self, now: float, known: bool) -> None:
        """Begin to measure the allowance."""
        self._measured_from = self._grown_at = now
        self._accepted, self._paused_s = 0, self.paused_s()
        self._measured_rate, self._known = self.rate or 0.0, known

    def _shrink(self, sent: float, now: float) -> None:
        if sent >= self._shrunk_at:  # once for all that were in flight together
            self._shrunk_at = now
            self._ceiling = self.limit
            self.limit = max(1.0, SHRINK * min(self.limit, self.in_flight))

    def _leave(self) -> None:
        self.in_flight -= 1
        self._admit()

    def _wake(self) -> None:
        self._timer = None
        self._admit()

    def _admit(self) -> None:
        """Let those that wait go, as far as the limits allow; `_leave` or a timer calls it again for the rest."""
        while self._waiting and (self._over or self.in_flight < int(self.limit)):
            now = self._clock()
            wait_s = max(self._not_before, self._next) - now
            if wait_s > 0 and not self._over:
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = asyncio.get_running_loop().call_later(wait_s, self._wake)
                return
            turn = heapq.heappop(self._waiting)[2]
            if turn.done():  # it was cancelled while it waited
                continue
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            if self.rate is not None:
                self._paced = self._next >= now - CREDIT_S
                self._next = max(now - CREDIT_S, self._next) + 1 / self.rate
            turn.set_result(None)
