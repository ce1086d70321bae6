"""A model's files to sharded parameters: only the blocks asked for, tensor by tensor, straight into their shards.

Reads a Hugging Face folder or hub id (config.json, safetensors in one file or sharded, tokenizer) or a .gguf file.
Writes nothing. No tensor above the layer asked for is read (or, from the hub, downloaded), and a host holds one
parameter's slices at a time, so nothing large ever lies unsharded on one device.
"""

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.stages import Lowered, Wrapped
from jaxtyping import Array, Float
from transformers import PreTrainedTokenizerFast

from fac_jax import plain
from fac_jax.backbone import gguf_file
from fac_jax.backbone.config import ModelConfig, read_model_config
from fac_jax.backbone.hf_folder import SafetensorsFiles, hub_fetch, local_fetch
from fac_jax.backbone.model import Backbone, Parameter, embed, logits, parameters, run_blocks
from fac_jax.corpus_files import local_files
from fac_jax.errors import UserError, first_line
from fac_jax.mesh import DATA, FEATURE, matmul_dtype, platform, sharding

log = logging.getLogger(__name__)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PIECE_TOKENS = 1024
"""Tokens that one CPU device computes at once: their activations fit its caches. 1.28 times as fast as 8 x 512 tokens
at once (SmolLM2-135M below layer 15, float32, 2 cores with 32 MiB of L3, 2026-11-25)."""
REDUNDANT = ("rotary_emb.inv_freq", "lm_head.weight")  # some exporters repeat what follows from config and embedding


@runtime_checkable
class Tensors(Protocol):
    """Named tensors that are read one at a time, by slice."""

    where: str
    """Path or hub id, for errors."""

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of those of `names` that are there."""

    def names(self) -> set[str]:
        """Names of all tensors."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """One slice of one tensor, in the file's type."""

    def digest(self) -> str:
        """Cheap identity of the content: sizes, names and sampled bytes."""


@dataclass
class Loaded:
    """A backbone on its mesh, with its tokenizer. `digest` names the model's content wherever it lies."""

    model: Backbone
    config: ModelConfig
    tokenizer: PreTrainedTokenizerFast
    digest: str
    mesh: Mesh
    dtype: str
    """Type of the parameters: float32 or bfloat16."""
    compiled: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Functions compiled for this backbone, so that callers compile once."""

    def residual_fn(self, layer: int) -> Callable[[Any, Any, Any], Float[Array, "b t d"]]:
        """Compiled `residual` at `layer`: tokens, segments, positions (int32 [b, t]) -> float32, rows over `data`."""
        one = self.residuals_fn((layer,), "float32")
        return lambda *batch: one(*batch)[0]

    def residuals_fn(self, layers: tuple[int, ...], dtype: str) -> Callable[[Any, Any, Any], tuple[Array, ...]]:
        """Compiled residuals of several layers (rising) from one pass, in the type `dtype`, each as `residual_fn`'s."""
        key = ("residuals", layers, dtype)
        compute = self._residuals_at(layers, dtype, platform(self.mesh))
        return self._jit(key, compute, (sharding(self.mesh, DATA, None),) * 3)

    def lower_residuals(
        self, layers: tuple[int, ...], dtype: str, rows: int, tokens: int, target: str | None = None
    ) -> Lowered:
        """The program of `residuals_fn` for [rows, tokens], not compiled; parameters may be shapes without values.

        `target` is the platform that it is for, where the devices of the mesh only stand in for others.
        """
        compute = self._residuals_at(layers, dtype, target or platform(self.mesh))
        program, state = self._program(compute, (sharding(self.mesh, DATA, None),) * 3)
        return program.lower(state, *(jax.ShapeDtypeStruct((rows, tokens), np.int32),) * 3)

    def logits_fn(self) -> Callable[[Any], Float[Array, "b t v"]]:
        """Compiled `logits`: residual at n_layers [b, t, d] -> logits, rows over `data`."""
        return self._jit("logits", logits, (sharding(self.mesh, DATA, None, None),))

    @property
    def tokenizer_digest(self) -> str:
        """Identity of the tokenizer: vocabulary, rules, special tokens and chat template."""
        text = self.tokenizer.backend_tokenizer.to_str() + str(self.tokenizer.chat_template)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _jit(self, key: Any, compute: Callable[..., Any], inputs: tuple[NamedSharding, ...]) -> Callable[..., Any]:
        """`compute(model, *inputs)` compiled once, over state that was split once."""
        if key not in self.compiled:
            program, state = self._program(compute, inputs)

            def call(*args: Any) -> Any:
                rows, data = args[0].shape[0], self.mesh.shape[DATA]
                if rows % data:
                    raise UserError(
                        f"{rows} rows do not divide over mesh.data={data}; "
                        "set backbone.rows_per_batch to a multiple of it"
                    )
                # jit itself takes no numpy batch for several devices where there are several processes
                return program(state, *jax.device_put(args, inputs))

            self.compiled[key] = call
        return self.compiled[key]

    def _residuals_at(self, layers: tuple[int, ...], dtype: str, target: str) -> Callable[..., tuple[Array, ...]]:
        compute = _residuals_at(layers, dtype)
        return _in_pieces(compute) if self.mesh.size == 1 and target == "cpu" else compute

    def _program(self, compute: Callable[..., Any], inputs: tuple[NamedSharding, ...]) -> tuple[Wrapped, Any]:
        """The jitted function of `_jit`, and the state that it is called with first."""
        graph, state = nnx.split(self.model)
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        program = jax.jit(
            lambda state, *args: compute(nnx.merge(graph, state), *args),
            in_shardings=(placed, *inputs),
            out_shardings=sharding(self.mesh, DATA, None, None),
        )
        return program, state


def _residuals_at(layers: tuple[int, ...], dtype: str) -> Callable[..., tuple[Array, ...]]:
    def compute(model: Backbone, tokens_bt: Array, segments_bt: Array, positions_bt: Array) -> tuple[Array, ...]:
        x_btd, found = embed(model, tokens_bt), []
        for first, last in itertools.pairwise((0, *layers)):
            x_btd = run_blocks(model, x_btd, segments_bt, positions_bt, first, last)
            found.append(x_btd.astype(dtype))
        return tuple(found)

    return compute


def _in_pieces(compute: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    """The same, a few rows of the batch at a time and one after the other; of rows that are all padding, zeros.

    The last batch of a data set is mostly padding.
    """

    def piecewise(model: Backbone, tokens_bt: Array, segments_bt: Array, positions_bt: Array) -> tuple[Array, ...]:
        def one(piece: tuple[Array, Array, Array]) -> tuple[Array, ...]:
            made = jax.eval_shape(compute, model, *piece)
            nothing = tuple(jnp.zeros(one.shape, one.dtype) for one in made)
            return jax.lax.cond((piece[1] > 0).any(), lambda: compute(model, *piece), lambda: nothing)

        b, t = tokens_bt.shape
        rows = max(n for n in range(1, b + 1) if b % n == 0 and (n == 1 or n * t <= PIECE_TOKENS))
        pieces = tuple(one.reshape(b // rows, rows, t) for one in (tokens_bt, segments_bt, positions_bt))
        return tuple(one.reshape(b, t, -1) for one in jax.lax.map(one, pieces))

    return piecewise


def load_backbone(source: str, layers: int | None, dtype: str, mesh: Mesh) -> Loaded:
    """Load a backbone onto `mesh`.

    `source` is a hub id, a Hugging Face folder, a .gguf file or pkg://PACKAGE/FILE.gguf. With `layers`, only that many
    blocks and the embedding; with None, all of them, the final norm and the unembedding. `dtype` is float32, bfloat16
    or auto (bfloat16 where the hardware multiplies it).

    Raises UserError for a source that cannot be had, a layer the model does not have, and tensors that are missing,
    misshapen or unknown to the architecture (all of them named together).
    """
    config, tensors = open_model(source)
    if layers is not None:
        config.check_layer(layers, source)
    if dtype == "auto":
        dtype = matmul_dtype(platform(mesh))
    if dtype not in DTYPES:
        raise UserError(f"backbone.dtype is {dtype!r}; choose from {['auto', *DTYPES]}")
    count = config.n_layers if layers is None else layers
    feature = mesh.shape[FEATURE]
    if config.n_kv_heads % feature or config.d_ff % feature:
        log.warning(
            "mesh.feature=%d does not divide %d key-value heads or %d hidden units: these are replicated, not sharded",
            *(feature, config.n_kv_heads, config.d_ff),
        )
    table = parameters(config, count, layers is None, feature)
    _check(tensors, table, config)
    arrays = {name: _place(tensors, wanted, DTYPES[dtype], mesh) for name, wanted in table.items()}
    digest = hashlib.sha256((plain.digest(config) + tensors.digest()).encode()).hexdigest()[:16]
    return Loaded(Backbone(config, arrays), config, load_tokenizer(source), digest, mesh, dtype)


def load_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a model, with its chat template. Raises UserError when there is none."""
    gguf = _gguf_path(source)
    if gguf is not None:
        return gguf_file.read_tokenizer(gguf)
    from transformers import AutoTokenizer  # with torch installed it imports that as well: six seconds

    folder = Path(source).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else source)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no tokenizer could be read ({first_line(error)})") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{source}: its tokenizer is a {type(tokenizer).__name__}, not a fast one; add a tokenizer.json"
        )
    return tokenizer


def open_model(source: str) -> tuple[ModelConfig, Tensors]:
    """Config and lazily read tensors of a model."""
    gguf = _gguf_path(source)
    if gguf is not None:
        return read_model_config(gguf_file.read_config(gguf)), gguf_file.GgufTensors(gguf)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return read_model_config(folder), SafetensorsFiles(source, local_fetch(folder))
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise UserError(
            f"{source}: no such model; give a hub id, a Hugging Face folder, a .gguf file or pkg://PACKAGE/FILE"
        )
    fetch = hub_fetch(source)
    path = fetch("config.json")
    if path is None:
        raise UserError(f"{source}: the hub has no config.json for it; backbone.model must name a transformers model")
    fetch("generation_config.json")
    return read_model_config(path), SafetensorsFiles(source, fetch)


def _gguf_path(source: str) -> Path | None:
    if not source.endswith(".gguf"):
        if source.startswith("pkg://"):
            raise UserError(f"{source}: inside a package only a .gguf file is read as a model")
        return None
    return local_files(source)[0]


def _source_names(parameter: Parameter) -> list[str]:
    return [parameter.source.format(i) for i in range(parameter.shape[0])] if parameter.stacked else [parameter.source]


def _source_shape(parameter: Parameter) -> tuple[int, ...]:
    shape = parameter.shape[1:] if parameter.stacked else parameter.shape
    return shape[::-1] if parameter.transposed else shape


def _check(tensors: Tensors, table: dict[str, Parameter], config: ModelConfig) -> None:
    """Compare names and shapes with the architecture's before a single tensor is read."""
    expected = {name: _source_shape(parameter) for parameter in table.values() for name in _source_names(parameter)}
    shapes = tensors.shapes(expected)
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [
        f"{name} has shape {list(shapes[name])}, not {list(expected[name])}"
        for name in expected
        if name in shapes and shapes[name] != expected[name]
    ]
    whole = parameters(config, config.n_layers, True, 1).values()
    known = {name for parameter in whole for name in _source_names(parameter)}
    unknown = sorted(name for name in tensors.names() - known if not name.endswith(REDUNDANT))
    problems += [f"{name} is not part of a {config.family} model" for name in unknown]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"{tensors.where}: the weights do not fit its config:\n  {shown}\ndownload the model again")


def _place(tensors: Tensors, wanted: Parameter, dtype: np.dtype, mesh: Mesh) -> Array:
    """One parameter, each shard read from the file by its own slice (once per slice, however many devices share it)."""
    target = np.dtype(np.float32) if wanted.norm else dtype
    names = _source_names(wanted)
    pieces: dict[str, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not wanted.stacked:
            return tensors.read(names[0], index).astype(target)
        rest = index[:0:-1] if wanted.transposed else index[1:]
        blocks = np.empty([len(range(*s.indices(n))) for s, n in zip(index, wanted.shape, strict=True)], target)
        for block, name in zip(blocks, names[index[0]], strict=True):
            values = tensors.read(name, rest)
            block[...] = values.T if wanted.transposed else values
        return blocks

    def piece(index: Any) -> np.ndarray:
        if str(index) not in pieces:
            pieces[str(index)] = read(index)
        return pieces[str(index)]

    return jax.make_array_from_callback(wanted.shape, NamedSharding(mesh, wanted.spec), piece)
