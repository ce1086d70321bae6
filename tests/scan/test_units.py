"""Units cover a corpus once, however it is shared out and wherever a pass goes on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fac_jax.distributed import START_S, Process
from fac_jax.scan import units as module
from fac_jax.scan.units import Cursor, Share, documents_left, units
from fac_jax.text import Document

SIZE = 5


@pytest.fixture(autouse=True, scope="module")
def small_units() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "UNIT_DOCUMENTS", SIZE)
        yield


def corpus(total: int) -> list[Document]:
    return [Document(f"{index:016x}", (), None, "") for index in range(total)]


@given(st.integers(0, 23), st.integers(1, 4), st.data())
def test_every_document_is_in_one_share_once(total: int, count: int, data: st.DataObject) -> None:
    seen: list[tuple[int, int, str]] = []
    for index in range(count):
        share, found = Share(index, count), list(units(corpus(total), Share(index, count), Cursor(0, 0)))
        assert [unit % count for unit, _, _ in found] == [index] * len(found)
        assert all(first == 0 for _, first, _ in found)
        mine = [(unit, place, d.id) for unit, first, held in found for place, d in enumerate(held, first)]
        seen += mine
        assert documents_left(total, share, Cursor(0, 0)) == len(mine)
        if mine:  # gone on with behind any of its documents, it gives the rest
            cut = data.draw(st.integers(1, len(mine)))
            cursor = Cursor(mine[cut - 1][0], mine[cut - 1][1] + 1)
            rest = list(units(corpus(total), share, cursor))
            assert [(u, p, d.id) for u, first, held in rest for p, d in enumerate(held, first)] == mine[cut:]
            assert documents_left(total, share, cursor) == len(mine) - cut
    assert sorted(seen) == [(i // SIZE, i % SIZE, f"{i:016x}") for i in range(total)]


def test_what_passes_of_other_shares_moves_the_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[float | None] = []
    monkeypatch.setattr(Process, "watchdog", SimpleNamespace(beat=lambda doing, limit_s: said.append(limit_s)))
    passed = []
    for _ in units(corpus(8 * SIZE), Share(2, 4), Cursor(0, 0)):
        passed.append(said.copy())
        said.clear()
    start, step = [START_S] * 3 * SIZE, [None] * 4 * SIZE
    assert passed == [start, step], "until the first unit is computed there is as much time as at the start"
    assert said == [None] * SIZE
    said.clear()
    assert len(list(units(corpus(4 * SIZE), Share(0, 1), Cursor(3, 0)))) == 1 and len(said) == 4 * SIZE


def test_shares_are_counted_from_one_in_names() -> None:
    assert [Share(index, 2).name for index in (0, 1)] == ["1-of-2", "2-of-2"]
