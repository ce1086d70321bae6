"""HTML that cannot be forgotten to be escaped: text becomes markup only through `tag`, and `tag` escapes it.

Corpora, generated samples and model output are hostile text. `Html` marks what this package built; everything else,
wherever it comes from, is escaped on its way in, in attributes too.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable

VOID_HTML = frozenset({"meta", "input", "br"})
VOID_SVG = frozenset({"line", "rect", "circle", "path", "polyline"})
"""Elements that hold nothing, and so are written without a closing tag."""
HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co"})
"""Unicode categories that can disguise text: control, formatting (bidi, zero width, tags), surrogates, private use."""
KEPT = frozenset("\n\t\N{ZERO WIDTH JOINER}")
"""Members of these categories that ordinary text needs: lines, tabs, and the joiner inside emoji and Indic scripts."""


class Html(str):
    """Markup built by this module: placed in a page as it is. Joined with a plain string it is a plain string again."""

    __slots__ = ()


def text(value: object) -> Html:
    """Escape a value; a character that could disguise text is shown as its code point."""
    return Html(html.escape(visible(str(value)), quote=True))


def visible(value: str) -> str:
    """`value` with hidden characters written out as \\uXXXX."""
    return "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) in HIDDEN and c not in KEPT else c for c in value)


def join(*parts: object) -> Html:
    """Parts one after another, nested iterables flattened, None left out; what is not markup yet is escaped."""
    return Html("".join(_content(part) for part in parts))


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """An element. Of attribute names a trailing underscore is dropped, others become hyphens; None leaves one out."""
    written = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            written += f" {key}" if value is True else f' {key}="{text(value)}"'
    if name in VOID_HTML:
        return Html(f"<{name}{written}>")
    if name in VOID_SVG:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(*content)}</{name}>")


def _content(part: object) -> Html:
    if isinstance(part, Html):
        return part
    if part is None:
        return Html("")
    if isinstance(part, Iterable) and not isinstance(part, str):
        return join(*part)
    return text(part)
