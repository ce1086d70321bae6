"""Conversations that a chat template refuses, among rows that it takes."""

from __future__ import annotations

import json

ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
"""Before a chat template: it then refuses two turns of one role, as Mistral's does."""


def with_refused(rows: str) -> tuple[str, int]:
    """Lines of JSON with a conversation of two users before every seventh, and how many that makes."""
    lines, made = rows.splitlines(), []
    for number, line in enumerate(lines):
        if number % 7 == 0:
            turns = [{"role": "user", "content": f"one {number}"}, {"role": "user", "content": "two"}]
            made.append(json.dumps({"text": turns, "harm": 0}))
        made.append(line)
    return "".join(f"{line}\n" for line in made), len(made) - len(lines)
