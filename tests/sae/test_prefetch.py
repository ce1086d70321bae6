"""Batches arrive in order, a few ahead; what goes wrong in the thread is raised in the loop; no thread is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest

from fac_jax.errors import UserError
from fac_jax.sae.prefetch import DEPTH, moving_ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def test_in_order_to_the_end() -> None:
    with moving_ahead(iter(range(50)), lambda number: number * 10) as ahead:
        assert list(ahead) == list(range(0, 500, 10))
    assert not threads()


def test_no_further_ahead_than_it_should_be() -> None:
    read: list[int] = []
    with moving_ahead(count(), lambda number: (read.append(number), number)[1]) as ahead:
        for number in range(5):
            assert next(ahead) == number
            time.sleep(0.02)
            assert read[-1] == number + DEPTH
    assert not threads()


@pytest.mark.parametrize("where", ["reading", "moving"])
def test_an_error_comes_in_its_place(where: str) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        if where == "reading":
            raise UserError("block 7 is damaged: harvest again")
        yield 3

    def move(number: int) -> int:
        if number == 3:
            raise UserError("block 7 is damaged: harvest again")
        return number

    found = []
    with (
        pytest.raises(UserError, match="block 7 is damaged: harvest again"),
        moving_ahead(items(), move) as ahead,
    ):
        for number in ahead:
            found.append(number)
    assert found == [0, 1, 2] and not threads()


def test_a_loop_that_fails_leaves_no_thread() -> None:
    with pytest.raises(KeyboardInterrupt), moving_ahead(count(), int) as ahead:
        next(ahead)
        raise KeyboardInterrupt
    assert not threads()
