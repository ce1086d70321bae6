"""Texts to sentence embeddings: a BERT encoder (arXiv 1810.04805) with a pooling, from a sentence-transformers folder.

Reads `config.json`, the safetensors, `tokenizer.json` and the modules (`modules.json`: transformer, pooling and perhaps
normalisation) of a local folder, a folder inside an installed package, or a hub id. Writes nothing.
Short texts share a row, in which they do not see each other: nearly nothing is computed on padding, and there are two
or three shapes to compile. (A row a text, sorted by length, computed 1.4 to 1.6 tokens for each real one.) Everything
is float32, whatever the device multiplies otherwise.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32
from tokenizers import Tokenizer

from fac_jax.backbone.hf_folder import Fetch, SafetensorsFiles, hub_fetch, local_fetch
from fac_jax.corpus_files import local_files
from fac_jax.errors import UserError
from fac_jax.progress import progress

ROWS = (64, 256)
"""Tokens of a row, which several texts share; a text goes into the shortest that holds it, or that of the model's
positions. Short rows cost less attention, and each size a compilation (1.3 s of a core: 3,000 tokens)."""
BATCH_TOKENS = 2048
"""Tokens in a batch: their activations stay in a CPU's caches."""
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}
LAYER = {
    "query": ("attention.self.query", True),
    "key": ("attention.self.key", True),
    "value": ("attention.self.value", True),
    "attended": ("attention.output.dense", True),
    "attended_norm": ("attention.output.LayerNorm", False),
    "up": ("intermediate.dense", True),
    "down": ("output.dense", True),
    "down_norm": ("output.LayerNorm", False),
}
"""Our names of a layer's parts, theirs, and whether the weight is a matrix, which they keep as (out, in)."""

TABLES = {"word": "word_embeddings", "position": "position_embeddings", "segment": "token_type_embeddings"}
WORDS = "embeddings.word_embeddings.weight"

Part = dict[str, Array]
"""`weight` and `bias` of a linear map, or of a layer norm."""


@dataclass(frozen=True)
class BertConfig:
    """What of `config.json` decides the computation."""

    heads: int
    layers: int
    norm_eps: float
    activation: str
    positions: int
    """Tokens that the model has position embeddings for."""


@dataclass(frozen=True)
class Encoder:
    """A sentence encoder with its tokenizer."""

    config: BertConfig
    parameters: dict[str, Any]
    """embeddings: tables and their norm; layers: parts stacked over the layers."""
    tokenizer: Tokenizer
    max_tokens: int
    """Tokens of a text that are read, special ones included; the rest is cut off."""
    lower: bool
    """Whether texts are made lower case before the tokenizer sees them."""
    pooling: str
    """mean (over the text's tokens), cls (the first token) or max."""
    normalised: bool
    """Whether the folder's modules end in a normalisation to length 1."""

    @cached_property
    def _pooled(self) -> Any:
        return jax.jit(partial(pooled, config=self.config, pooling=self.pooling))

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut at `max_tokens`."""
        cleaned = [text.strip().lower() if self.lower else text.strip() for text in texts]
        return [one.ids for one in self.tokenizer.encode_batch(cleaned)]

    def encode(self, token_ids: Sequence[Sequence[int]]) -> Float32[np.ndarray, "n d"]:
        """Pooled hidden states of texts given by their tokens, before any normalisation (`unit` does that)."""
        width = self.parameters["embeddings"]["norm"]["bias"].shape[0]
        found = np.zeros((len(token_ids), width), np.float32)
        with progress("embed", len(token_ids), "texts") as bar:
            for size, rows in pack([len(ids) for ids in token_ids], self.config.positions):
                shape = max(1, BATCH_TOKENS // size), size
                tokens_bt, segments_bt, positions_bt = (np.zeros(shape, np.int32) for _ in range(3))
                for place, texts in enumerate(rows):
                    start = 0
                    for segment, text in enumerate(texts, 1):
                        span = slice(start, start := start + len(token_ids[text]))
                        tokens_bt[place, span], segments_bt[place, span] = token_ids[text], segment
                        positions_bt[place, span] = np.arange(len(token_ids[text]))
                vectors = np.asarray(self._pooled(self.parameters, tokens_bt, segments_bt, positions_bt))
                for place, texts in enumerate(rows):
                    found[texts] = vectors[place, 1 : len(texts) + 1]
                bar.advance(sum(map(len, rows)))
        return found


def pack(lengths: Sequence[int], positions: int) -> Iterator[tuple[int, list[list[int]]]]:
    """Batches of rows: the tokens that a row has, and for each row the texts that share it; empty texts are in none.

    A row takes the longest text that is left and then, again and again, the longest that fits.
    """
    sizes = [size for size in ROWS if size < positions] + [positions]
    of_size: dict[int, list[tuple[int, int]]] = {size: [] for size in sizes}
    for text, length in enumerate(lengths):
        if length:
            of_size[next(size for size in sizes if length <= size)].append((length, text))
    for size, left in of_size.items():
        left.sort()
        rows: list[list[int]] = []
        while left:
            row, room = [], size
            while fitting := bisect_right(left, room, key=lambda one: one[0]):
                length, text = left.pop(fitting - 1)
                row.append(text)
                room -= length
            rows.append(row)
        count = max(1, BATCH_TOKENS // size)
        for first in range(0, len(rows), count):
            yield size, rows[first : first + count]


def hidden(
    parameters: dict[str, Any],
    tokens_bt: Int32[Array, "b t"],
    segments_bt: Int32[Array, "b t"],
    positions_bt: Int32[Array, "b t"],
    config: BertConfig,
) -> Float[Array, "b t d"]:
    """Last hidden states (Hugging Face's `last_hidden_state`) of the texts of each row, which do not see each other.

    `segments_bt` numbers the texts of a row from 1; 0 is padding, and what stands there means nothing.
    """
    with jax.default_matmul_precision("highest"):
        tables = parameters["embeddings"]
        x_btd = tables["word"][tokens_bt] + tables["position"][positions_bt] + tables["segment"][0]
        x_btd = _norm(tables["norm"], x_btd, config.norm_eps)
        same_btt = segments_bt[:, :, None] == segments_bt[:, None, :]
        blocked_b1tt = jnp.where(same_btt, 0.0, jnp.finfo(x_btd.dtype).min)[:, None]

        def block(x_btd: Array, layer: dict[str, Part]) -> tuple[Array, None]:
            query, key, value = (
                _heads(_linear(layer[name], x_btd), config.heads) for name in ("query", "key", "value")
            )
            scores = jnp.einsum("bqnh,bknh->bnqk", query, key) / np.sqrt(query.shape[-1])
            weights = jax.nn.softmax(scores + blocked_b1tt, axis=-1)
            attended = jnp.einsum("bnqk,bknh->bqnh", weights, value).reshape(x_btd.shape)
            x_btd = _norm(layer["attended_norm"], x_btd + _linear(layer["attended"], attended), config.norm_eps)
            inner = _linear(layer["down"], ACTIVATIONS[config.activation](_linear(layer["up"], x_btd)))
            return _norm(layer["down_norm"], x_btd + inner, config.norm_eps), None

        return jax.lax.scan(block, x_btd, parameters["layers"])[0]


def pooled(
    parameters: dict[str, Any],
    tokens_bt: Int32[Array, "b t"],
    segments_bt: Int32[Array, "b t"],
    positions_bt: Int32[Array, "b t"],
    config: BertConfig,
    pooling: str,
) -> Float[Array, "b s d"]:
    """One vector for each text of each row, from its tokens: that of segment s at [:, s]; others mean nothing."""
    x_btd = hidden(parameters, tokens_bt, segments_bt, positions_bt, config)
    rows, length, width = x_btd.shape
    slot_m = (jnp.arange(rows)[:, None] * (length + 1) + segments_bt).ravel()
    x_md, slots = x_btd.reshape(-1, width), rows * (length + 1)
    if pooling == "max":
        found = jax.ops.segment_max(x_md, slot_m, slots)
    elif pooling == "cls":
        found = jax.ops.segment_sum(jnp.where(positions_bt.reshape(-1, 1) == 0, x_md, 0), slot_m, slots)
    else:
        counts = jax.ops.segment_sum(jnp.ones_like(slot_m), slot_m, slots)
        found = jax.ops.segment_sum(x_md, slot_m, slots) / jnp.maximum(counts, 1)[:, None]
    return found.reshape(rows, length + 1, width)


def unit(vectors_nd: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Rows scaled to length 1; a row of zeros stays."""
    norms = np.linalg.norm(vectors_nd, axis=1, keepdims=True)
    return vectors_nd / np.maximum(norms, np.finfo(np.float32).tiny)


def load_encoder(source: str) -> Encoder:
    """Read an encoder. Raises UserError for a folder of another layout, architecture or kind of pooling."""
    fetch = _fetch(source)
    config = _json(fetch, source, "config.json")
    if config.get("model_type") != "bert" or config.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(
            f"{source}: is a {config.get('model_type')!r} with {config.get('position_embedding_type', 'absolute')} "
            "positions; diversity.embedding_model must be a BERT with absolute ones, such as all-MiniLM-L6-v2"
        )
    if config["hidden_act"] not in ACTIVATIONS:
        raise UserError(f"{source}: hidden_act is {config['hidden_act']!r}; known are {', '.join(ACTIVATIONS)}")
    pooling, normalised = _modules(fetch, source)
    settings = _json(fetch, source, "sentence_bert_config.json")
    files = SafetensorsFiles(source, fetch)
    positions = config["max_position_embeddings"]
    max_tokens = min(settings.get("max_seq_length") or positions, positions)
    path = fetch("tokenizer.json")
    if path is None:
        raise UserError(f"{source}: has no tokenizer.json; save the tokenizer as a fast one into the folder")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return Encoder(
        config=BertConfig(
            heads=config["num_attention_heads"], layers=config["num_hidden_layers"],
            norm_eps=config["layer_norm_eps"], activation=config["hidden_act"], positions=positions,
        ),
        parameters=_parameters(files, source, config["num_hidden_layers"]),
        tokenizer=tokenizer, max_tokens=max_tokens, lower=bool(settings.get("do_lower_case")), pooling=pooling,
        normalised=normalised,
    )  # fmt: skip


def folder_of(source: str) -> str:
    """`source` with pkg://PACKAGE/FOLDER made the path of that folder; a path or a hub id stays as it is."""
    return str(local_files(f"{source}/config.json")[0].parent) if source.startswith("pkg://") else source


def _fetch(source: str) -> Fetch:
    folder = Path(folder_of(source)).expanduser()
    if folder.is_dir():
        return local_fetch(folder)
    if source.count("/") != 1 or source.startswith(("/", ".", "~")):  # a hub id is OWNER/NAME
        raise UserError(f"{source}: no such folder; mend diversity.embedding_model")
    return hub_fetch(source, "diversity.embedding_model")


def _json(fetch: Fetch, source: str, name: str) -> Any:
    path = fetch(name)
    if path is None:
        raise UserError(
            f"{source}: has no {name}; diversity.embedding_model must be a folder of the sentence-transformers layout "
            "(config.json, modules.json, sentence_bert_config.json, 1_Pooling/config.json, tokenizer.json, safetensors)"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download the model again") from None


def _modules(fetch: Fetch, source: str) -> tuple[str, bool]:
    """The pooling, and whether vectors are normalised after it."""
    modules = _json(fetch, source, "modules.json")
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UserError(
            f"{source}: its modules are {', '.join(kinds)}; known are Transformer, Pooling and then perhaps Normalize"
        )
    settings = _json(fetch, source, f"{modules[1]['path']}/config.json")
    asked = [name for name, on in settings.items() if name.startswith("pooling_mode") and on is True]
    asked = [f"pooling_mode_{on}_tokens" for on in [settings.get("pooling_mode")] if isinstance(on, str)] or asked
    if len(asked) != 1 or asked[0] not in POOLINGS:
        raise UserError(f"{source}: pools by {' and '.join(asked) or 'nothing'}; known is one of {', '.join(POOLINGS)}")
    return POOLINGS[asked[0]], kinds[2:] == ["Normalize"]


def _parameters(files: SafetensorsFiles, source: str, layers: int) -> dict[str, Any]:
    """Parameters in float32, those of the layers stacked; weights of linear maps as (in, out)."""
    names = files.names()
    prefix = "bert." if f"bert.{WORDS}" in names else ""

    def read(name: str) -> np.ndarray:
        if prefix + name not in names:
            raise UserError(f"{source}: its safetensors lack {prefix + name}; they are not those of a BERT encoder")
        return files.read(prefix + name, (slice(None),)).astype(np.float32)

    def part(name: str, matrix: bool) -> dict[str, np.ndarray]:
        weight = read(f"{name}.weight")
        return {"weight": weight.T if matrix else weight, "bias": read(f"{name}.bias")}

    stacked = {}
    for ours, (theirs, matrix) in LAYER.items():
        each = [part(f"encoder.layer.{layer}.{theirs}", matrix) for layer in range(layers)]
        stacked[ours] = {name: jnp.asarray(np.stack([one[name] for one in each])) for name in ("weight", "bias")}
    tables = {ours: jnp.asarray(read(f"embeddings.{theirs}.weight")) for ours, theirs in TABLES.items()}
    norm = jax.tree.map(jnp.asarray, part("embeddings.LayerNorm", False))
    return {"embeddings": {**tables, "norm": norm}, "layers": stacked}


def _linear(part: Part, x: Array) -> Array:
    return x @ part["weight"] + part["bias"]


def _norm(part: Part, x: Array, eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps) * part["weight"] + part["bias"]


def _heads(x_btd: Array, heads: int) -> Array:
    return x_btd.reshape(*x_btd.shape[:2], heads, -1)
