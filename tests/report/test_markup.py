"""Nothing that is not markup becomes markup."""

from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fac_jax.report.markup import Html, join, tag, text, visible


class Reader(HTMLParser):
    """What a browser would see: tags with attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.words = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


@given(st.text())
def test_any_text_is_read_back_as_text_alone(value: str) -> None:
    page = Reader(tag("p", value, title=value))
    assert [name for name, _ in page.tags] == ["p"]
    assert page.words == visible(value)
    assert page.tags[0][1]["title"] == visible(value)


def test_text_joined_to_markup_is_escaped_again() -> None:
    """Html + str is a plain str, so forgetting to wrap it shows markup instead of obeying text."""
    assert tag("p", tag("b", "x") + "<i>") == "<p>&lt;b&gt;x&lt;/b&gt;&lt;i&gt;</p>"


@pytest.mark.parametrize("hidden", ["\u202e", "\u200b", "\x1b", "\x00", "\U000e0041", "\ud800"])
def test_characters_that_disguise_text_are_shown(hidden: str) -> None:
    assert text(f"a{hidden}b") == f"a\\u{ord(hidden):04x}b"


def test_words_of_every_script_stay() -> None:
    assert visible("naïve नमस्ते 你好 👩\u200d🚀\n\t") == "naïve नमस्ते 你好 👩\u200d🚀\n\t"


def test_attributes() -> None:
    assert tag("input", type="checkbox", checked=True, id=None, aria_label='a"b') == (
        '<input type="checkbox" checked aria-label="a&quot;b">'
    )
    assert tag("circle", r=1, class_="x") == '<circle r="1" class="x"/>'


def test_join_flattens_and_leaves_none_out() -> None:
    assert join("<", [Html("<br>"), None, (1, 2.5)]) == "&lt;<br>12.5"
