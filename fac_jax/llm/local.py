"""The backbone itself as a writer: no server, no key, no network.

Reads the whole backbone once and decodes in this process (`backbone/generate.py`: key-value cache, refilled slots). It
is what `llm.url: null` means. Writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float32

from fac_jax.backbone.generate import generate
from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.config.file import Config
from fac_jax.errors import UserError
from fac_jax.llm.client import Directions, Message, OnReply, Reply, Request
from fac_jax.llm.fluency import nats_per_token


def open_local(config: Config, mesh: Mesh, directions: Directions | None = None) -> LocalGenerator:
    """Load the whole backbone as a writer."""
    loaded = load_backbone(config.backbone.model, None, config.backbone.dtype, mesh)
    return LocalGenerator(loaded, config.backbone.model, config.llm.local_batch, directions)


class LocalGenerator:
    """Decodes with a backbone that is in memory, `batch` replies at a time."""

    def __init__(self, loaded: Loaded, source: str, batch: int, directions: Directions | None = None) -> None:
        """`source` is where the model came from; `directions` is what it may be steered by. Raises UserError for a
        model that was not trained to chat."""
        self.model = model_name(source)
        self.name = f"embedded:{self.model}"
        if loaded.tokenizer.chat_template is None:
            raise UserError(
                f"{source} has no chat template, so it cannot be asked to write: "
                "set llm.url to a server, or backbone.model to an instruction-tuned model"
            )
        self._loaded, self._batch, self._directions = loaded, batch, directions
        self._tokens = 0

    @property
    def spent(self) -> str:
        """See `Generator.spent`."""
        return f"{self._tokens:,} tokens"

    def generate(
        self, requests: Sequence[Request], on_reply: OnReply | None = None, about: Sequence[str] | None = None
    ) -> list[Reply]:
        """See `Generator.generate`. Raises UserError when a schema is asked for, as nothing here enforces one, and for
        a steered request where there are no directions."""
        if any(request.schema is not None for request in requests):
            raise UserError(f"{self.name} cannot follow a JSON schema; set llm.url to a server that can")
        if self._directions is None and any(request.steer is not None for request in requests):
            raise UserError(f"{self.name} was opened without an SAE's directions, so it cannot be steered")
        replies: dict[int, Reply] = {}
        for settings in dict.fromkeys(_settings(request) for request in requests):
            alike = {i: self._encode(r.messages) for i, r in enumerate(requests) if _settings(r) == settings}
            # Neighbours in this order enter the cache together, padded to the longest: equal lengths waste nothing.
            chosen = sorted(alike, key=lambda i: (len(alike[i]), alike[i], i))
            self._generate(requests, chosen, [alike[i] for i in chosen], replies, on_reply)
        return [replies[index] for index in range(len(requests))]

    def nats_per_token(self, messages: Sequence[Sequence[Message]], texts: Sequence[str]) -> Float32[np.ndarray, " n"]:
        """See `Fluency`; unsteered, whatever the texts were written with."""
        tokenizer = self._loaded.tokenizer
        prompts = [self._encode(one) for one in messages]
        replies = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        return nats_per_token(self._loaded, prompts, replies)

    def _generate(
        self,
        requests: Sequence[Request],
        chosen: Sequence[int],
        prompts: Sequence[list[int]],
        replies: dict[int, Reply],
        on_reply: OnReply | None,
    ) -> None:
        """Those requests that are sampled alike, with their prompts in tokens."""
        max_tokens, temperature, top_p = _settings(requests[chosen[0]])
        tokenizer = self._loaded.tokenizer

        def done(place: int, tokens: list[int]) -> None:
            # Special tokens stay in the text: a template mark in the middle is the caller's to reject.
            text = str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
            reason = "stop" if len(tokens) < max_tokens else "length"
            reply = Reply(text, reason, len(prompts[place]), len(tokens), self.model)
            replies[chosen[place]] = reply
            self._tokens += len(prompts[place]) + len(tokens)
            if on_reply is not None:
                on_reply(chosen[place], reply)

        steer, layer = self._vectors([requests[index] for index in chosen])
        generate(
            self._loaded,
            prompts,
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seeds=[requests[index].seed for index in chosen],
            batch=self._batch,
            stop_ids={*self._loaded.config.eos_ids, tokenizer.eos_token_id} - {None},
            on_done=done,
            steer=steer,
            layer=layer,
        )

    def _vectors(self, requests: Sequence[Request]) -> tuple[list[Float[np.ndarray, " d"] | None] | None, int | None]:
        """What each request is steered by, and after how many blocks."""
        features = sorted({request.steer.feature for request in requests if request.steer is not None})
        if self._directions is None or not features:
            return None, None
        rows = dict(zip(features, np.asarray(self._directions.rows(features), np.float32), strict=True))
        steers = [request.steer for request in requests]
        return [None if one is None else one.strength * rows[one.feature] for one in steers], self._directions.layer

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        tokenizer = self._loaded.tokenizer
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def model_name(source: str) -> str:
    """Name of a model without its place, file ending and quantisation: `SmolLM2-135M-Instruct`."""
    return re.sub(r"(\.(I?Q\d\w*|B?F\d+))?\.gguf$", "", PurePosixPath(source).name, flags=re.IGNORECASE)


def _settings(request: Request) -> tuple[int, float, float]:
    return request.max_tokens, request.temperature, request.top_p
