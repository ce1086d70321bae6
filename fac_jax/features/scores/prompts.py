"""Prompts that test explanations: files in `tasks/shared/`, one prompt each.

What they ask does not depend on what the features are for, so no task has its own.
"""

from __future__ import annotations

import hashlib

from fac_jax.features.task import SHARED

NAMES = ("detect", "fuzz", "write_example")
"""The prompts there are."""


def shared_prompt(name: str) -> str:
    """The prompt in NAME.txt, as it is sent."""
    return (SHARED / f"{name}.txt").read_text(encoding="utf-8").strip()


def shared_digest() -> str:
    """Of these prompts: a part of what makes a product that was asked with them."""
    return hashlib.sha256(b"\0".join(shared_prompt(name).encode() for name in NAMES)).hexdigest()[:16]
