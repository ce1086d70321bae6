"""Chat requests to whoever answers them: the protocol that the rest of the package knows.

`llm/http.py` speaks to any OpenAI-compatible server, `llm/local.py` decodes with the backbone in this process, and
`llm/fake.py` is the double that tests use. What comes back is untrusted text: `llm/structured.py` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32

Message = dict[str, str]


@dataclass(frozen=True)
class Steer:
    """Write as if a feature of the SAE were active: what decoding it adds is added while the reply is written."""

    feature: int
    strength: float
    """Activation that is added: the feature's decoder row, times this, joins the residual."""


@dataclass(frozen=True)
class Directions:
    """An SAE as a writer needs it, to be steered."""

    layer: int
    """Blocks applied before what it reads, and before what is added."""
    rows: Callable[[Sequence[int]], Float[np.ndarray, "n d"]]
    """Decoder rows of features."""


@dataclass(frozen=True)
class Request:
    """One chat completion to be had."""

    messages: tuple[Message, ...]
    """Turns, each {"role": ..., "content": ...}."""
    max_tokens: int
    """New tokens at most."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus."""
    seed: int = 0
    """Sampling seed; the same request with the same seed asks for the same text (servers only try)."""
    schema: dict[str, Any] | None = None
    """JSON schema that the text should follow. Validate the text all the same."""
    steer: Steer | None = None
    """What the writer is steered by, beside being asked; only the embedded one can be."""


@dataclass(frozen=True)
class Reply:
    """One answer."""

    text: str
    """What was written; empty where a server withheld the content (`finish_reason` says why)."""
    finish_reason: str
    """`stop` when the writer ended by itself, `length` when max_tokens cut it, or the server's own word."""
    prompt_tokens: int
    """Tokens read; 0 when the server does not count."""
    completion_tokens: int
    """Tokens written; 0 when the server does not count."""
    model: str
    """Who answered."""


OnReply = Callable[[int, Reply], None]


class Generator(Protocol):
    """Answers chat requests, many at a time."""

    @property
    def name(self) -> str:
        """Kept beside every text it wrote, such as `embedded:SmolLM2-135M-Instruct`."""

    @property
    def spent(self) -> str:
        """What its answers took so far, for the end of a progress line, such as `12,300 tokens, 31 from the cache`."""

    def generate(
        self, requests: Sequence[Request], on_reply: OnReply | None = None, about: Sequence[str] | None = None
    ) -> list[Reply]:
        """Replies in the order of `requests`.

        `on_reply(index, reply)` is called for each as it arrives, in any order, always before an error about
        another one is raised: a caller that stores what it is handed loses nothing.
        `about` says for the ledger what each request is for: "PURPOSE:FEATURE", such as "explain:812". It is not sent.
        """


@runtime_checkable
class Fluency(Protocol):
    """A generator that can say how surprising a text is to its model."""

    def nats_per_token(self, messages: Sequence[Sequence[Message]], texts: Sequence[str]) -> Float32[np.ndarray, " n"]:
        """Mean negative log likelihood of each text's tokens, as the reply to its messages; NaN for an empty text."""
