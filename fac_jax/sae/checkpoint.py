"""Files of the autoencoder: checkpoints of a training in progress, and the finished SAE.

    checkpoints/STEP/state, meta   orbax; meta holds shape, type and digest of every leaf, because orbax itself loads a
                                   flipped bit silently and reports a wrong shape as something else
    sae.safetensors                W_dec [features, d_model] (row f is the direction of feature f, and encodes it too
                                   unless there is a W_enc of the same shape), b_enc [features], b_dec [d_model], and
                                   threshold [features] unless top-k decides; float32, for raw residuals
    config.json                    `SaeCard`: k, where the residuals came from, how long it was trained, how good it is

The only module that uses orbax.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import Array, UInt32
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN, PreservationPolicy
from safetensors import SafetensorError, safe_open

from fac_jax.distributed import is_first, wait_for_all
from fac_jax.errors import UserError, first_line
from fac_jax.mesh import FEATURE, sharding
from fac_jax.plain import from_plain, to_plain
from fac_jax.runs import write_text
from fac_jax.sae.formats.source import check_k, locate, read_foreign
from fac_jax.sae.model import SAE

State = TypeVar("State")
FORMAT = 2
BLOCK_BYTES = 2**26  # of a tensor, hashed at a time
UNKNOWN_K = 2**31
"""K of a checkpoint that was not measured: any that was measured is better."""
# name in the file -> attribute of SAE; the last two are not in every file
TENSORS = {
    "W_dec": "w_fd", "b_enc": "b_enc_f", "b_dec": "b_dec_d", "W_enc": "w_enc_fd", "threshold": "threshold_f"
}  # fmt: skip


@dataclass(frozen=True)
class SaeCard:
    """What config.json says of an SAE."""

    format: int
    features: int
    k: int | None
    """Features a row keeps; None where a threshold decides."""
    d_model: int
    layer: int
    """Blocks applied before the residual was read."""
    variant: str
    """topk, batchtopk, jumprelu or matryoshka as it was trained; of an SAE from elsewhere, what its file says."""
    model: str
    """Backbone as it was named in the config."""
    model_digest: str | None
    """Digest of the backbone's weights and config; None for an SAE from elsewhere, which does not know it."""
    rows: int
    """Rows (tokens) it was trained on, repetitions included."""
    steps: int
    metrics: dict[str, float]
    """On held-out rows."""
    tensors: dict[str, str]
    """SHA-256 of each tensor's bytes."""
    density: tuple[int, ...] = ()
    """Features by the share of held-out rows they are active on, between metrics.DENSITY_EDGES; empty if not known."""

    @property
    def digest(self) -> str:
        """Identifies the weights and k (16 hex digits)."""
        return hashlib.sha256(json.dumps([self.k, sorted(self.tensors.items())]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LoadedSae:
    """A finished SAE and what it was made for."""

    sae: SAE
    features: int
    k: int | None
    """Features a row keeps; None where a threshold decides."""
    d_model: int
    digest: str
    layer: int
    model: str
    model_digest: str | None


def save_sae(folder: Path, sae: SAE, card: Mapping[str, Any]) -> SaeCard:
    """Write sae.safetensors and then config.json; `card` has the fields of `SaeCard` that the arrays do not give.

    Every process writes the rows that it holds into one file, so nothing is gathered: W need not fit anywhere whole.
    """
    parameters = {name: getattr(sae, attribute) for name, attribute in TENSORS.items()}
    arrays = {name: jnp.asarray(value[...]) for name, value in parameters.items() if value is not None}
    path, partial_path = folder / "sae.safetensors", folder / ".sae.safetensors.tmp"
    begins, header = _safetensors_header(arrays)
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        with open(partial_path, "wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(array.nbytes for array in arrays.values()))
    wait_for_all("sae.safetensors is begun")
    with open(partial_path, "r+b") as file:
        for name, array in arrays.items():
            for shard in array.addressable_shards:
                if shard.replica_id == 0:
                    row_bytes = array.nbytes // array.shape[0]
                    file.seek(begins[name] + (shard.index[0].start or 0) * row_bytes)
                    file.write(np.ascontiguousarray(shard.data).data)
        os.fsync(file.fileno())
    wait_for_all("sae.safetensors is written")
    if is_first():
        features, d_model = arrays["W_dec"].shape
        with safe_open(partial_path, framework="numpy") as file:
            tensors = {name: _sha256(file, name) for name in arrays}
        os.replace(partial_path, path)
        full = SaeCard(format=FORMAT, features=features, d_model=d_model, tensors=tensors, **card)
        write_text(folder / "config.json", json.dumps(to_plain(full), indent=2, allow_nan=False) + "\n")
    wait_for_all("config.json is written")
    return read_card(folder)


def _safetensors_header(arrays: Mapping[str, Array]) -> tuple[dict[str, int], bytes]:
    """Where each float32 tensor begins in a .safetensors file, and what stands before them all."""
    described, at = {}, 0
    for name, array in arrays.items():
        described[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return {name: len(header) + value["data_offsets"][0] for name, value in described.items()}, header


def load_sae(
    source: str | Path,
    mesh: Mesh,
    expect_d_model: int | None = None,
    expect_layer: int | None = None,
    expect_model_digest: str | None = None,
) -> LoadedSae:
    """Load a finished SAE onto `mesh`, features sharded: ours or another program's, here or on the hub (`source.py`).

    Raises UserError when there is none, a file is damaged (the tensor is named), or it was made for another width,
    layer or backbone than is expected. The backbone of an SAE from elsewhere is not known, so it is not checked.
    """
    found = locate(source)
    own = found.form == "fac"  # read by shards; what another program wrote is read whole
    card, arrays = (read_card(found.path), {}) if own else read_sae(source)
    if expect_d_model not in (None, card.d_model):
        raise UserError(
            f"SAE in {source} reads width {card.d_model}, backbone has {expect_d_model}: "
            f"it was trained on {card.model}; load that model or train an SAE for this one"
        )
    if expect_layer not in (None, card.layer):
        raise UserError(
            f"SAE in {source} was trained on layer {card.layer}, config asks {expect_layer}: "
            f"set backbone.layer to {card.layer} or run `fac train` for layer {expect_layer}"
        )
    if card.model_digest is not None and expect_model_digest not in (None, card.model_digest):
        raise UserError(
            f"SAE in {source} was trained on {card.model} (digest {card.model_digest}), the backbone loaded has digest "
            f"{expect_model_digest}: set backbone.model to the one it was trained on or run `fac train` again"
        )
    if card.features % mesh.shape[FEATURE]:
        raise UserError(
            f"SAE in {source} has {card.features} features, which {mesh.shape[FEATURE]} shards cannot share equally: "
            f"choose a mesh.feature that divides {card.features}"
        )
    if own:
        placed = _place_tensors(found.path / "sae.safetensors", card, mesh)
    else:
        placed = {name: jax.device_put(array, sharding(mesh, *SAE.SPECS[name])) for name, array in arrays.items()}
    sae = SAE(**placed)
    return LoadedSae(sae, card.features, card.k, card.d_model, card.digest, card.layer, card.model, card.model_digest)


def read_sae(source: str | Path, k: int | None = None) -> tuple[SaeCard, dict[str, np.ndarray]]:
    """The card of an SAE and its arrays on the host by attribute of `SAE`; `source` as for `load_sae`.

    `k` replaces the K of a Top-K SAE (what was measured with the old one is then left out of the card).
    """
    found = locate(source)
    if found.form != "fac":
        foreign = read_foreign(source, k)
        tensors = {name: foreign.arrays[key] for name, key in TENSORS.items() if key in foreign.arrays}
        features, d_model = tensors["W_dec"].shape
        digests = {
            name: hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for name, array in tensors.items()
        }
        card = SaeCard(format=FORMAT, features=features, d_model=d_model, tensors=digests, **foreign.card)
        return card, foreign.arrays
    card = read_card(found.path)
    if k is not None:
        check_k(source, k, k if card.k else None, card.features)
        card = replace(card, k=k, metrics=card.metrics if k == card.k else {})
    return card, _read_tensors(found.path / "sae.safetensors", card)


def read_card(folder: str | Path) -> SaeCard:
    """Read config.json. Raises UserError when it is missing, unreadable or of a newer format."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no SAE in {folder} ({path.name} is missing): run `fac train` first or set scan.sae") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): run `fac train` again") from None
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} has format {found!r}, this version reads {FORMAT}: update fac-jax, or train again")
    return from_plain(SaeCard, raw, str(path))


def open_checkpoints(folder: Path, keep: int = 2, keep_best: int = 0) -> ocp.CheckpointManager:
    """The newest `keep` checkpoints below `folder`, and the best `keep_best` of all.

    Saves run in the background; leftovers of a kill are removed.
    """
    policies: list[PreservationPolicy] = [LatestN(keep)]
    if keep_best:
        best = BestN(get_metric_fn=_rank, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False)
        policies.append(best)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(policies),
        best_fn=_rank,
        best_mode="min",
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def _rank(quality: Mapping[str, float]) -> tuple[float, float]:
    """Smaller is better: a reconstruction from fewer features first, as K anneals, and then the better one."""
    return quality["k"], quality["fvu"]


def save_state(manager: ocp.CheckpointManager, step: int, state: Any, k: int = UNKNOWN_K, fvu: float = 0.0) -> None:
    """Save every leaf of `state`, any tree of arrays, with its digest; K and fvu decide which is best."""
    leaves = _named(state)
    meta = {
        name: [*_form(leaf), _hex(value)]
        for (name, leaf), value in zip(leaves.items(), leaf_digests(leaves), strict=True)
    }
    saved = ocp.args.Composite(state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave(meta))
    manager.save(step, args=saved, metrics={"k": k, "fvu": fvu})


def restore_state(manager: ocp.CheckpointManager, like: State, best: bool = False) -> tuple[int, State] | None:
    """The newest (or the best) checkpoint as (step, state), or None when there is none.

    `like` has the structure of the state, with arrays or ShapeDtypeStructs that carry shape, type and sharding; the
    mesh may be another one than at saving. Raises UserError naming the leaf that has another shape or was damaged.
    """
    step = manager.best_step() if best else manager.latest_step()
    if step is None:
        return None
    path = Path(manager.directory) / str(step)
    remedy = f"delete {path} to go on from the checkpoint before it"
    named = _named(like)
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in named.items()
    }
    try:
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    except Exception as error:
        raise UserError(f"checkpoint {path} cannot be read ({first_line(error)}): {remedy}") from error
    for name in sorted(meta.keys() | wanted.keys()):
        there, asked = meta[name][:2] if name in meta else None, _form(wanted[name]) if name in wanted else None
        if there != asked:
            raise UserError(
                f"checkpoint {path} holds {name} as {_say(there)}, this training needs {_say(asked)}: "
                "set the sae and train settings it was made with, or train into another run.dir"
            )
    try:
        leaves = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))["state"]
    except Exception as error:
        raise UserError(f"checkpoint {path} cannot be read ({first_line(error)}): {remedy}") from error
    for name, value in zip(wanted, leaf_digests({name: leaves[name] for name in wanted}), strict=True):
        if _hex(value) != meta[name][2]:
            raise UserError(
                f"checkpoint {path} is damaged: {name} has digest {_hex(value)}, was saved as {meta[name][2]}: {remedy}"
            )
    return step, jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in named])


@jax.jit
def leaf_digests(leaves: Mapping[str, Array]) -> list[UInt32[Array, " 2"]]:
    """64 bits of each leaf, computed where it lies: the same on every mesh, and changed by any single changed element.

    Two sums, modulo 2^32, of a scrambled (bits, position). Scrambling is a bijection of the bits at a position, so a
    change of one element always changes both sums; several changes cancel with a chance of 2^-64.
    """
    return [_digest(leaf) for leaf in leaves.values()]


def _digest(leaf: Array) -> Array:
    width = leaf.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    salted = [_scramble(bits ^ _scramble(position + np.uint32(salt))) for salt in (0x9E3779B9, 0x85EBCA6B)]
    return jnp.stack([jnp.sum(value, dtype=jnp.uint32) for value in salted])


def _scramble(x: Array) -> Array:
    """The finaliser of MurmurHash3: a bijection on 32 bits."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _hex(value: Array) -> str:
    high, low = np.asarray(value)
    return f"{high:08x}{low:08x}"


def _named(state: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(state)
    }


def _form(leaf: Any) -> list[Any]:
    return [list(leaf.shape), str(leaf.dtype)]


def _say(form: list[Any] | None) -> str:
    return "nothing" if form is None else f"{form[1]} of shape {tuple(form[0])}"


def _sha256(file: Any, name: str) -> str:
    """Of a tensor in an open .safetensors file, block by block."""
    rows, found = file.get_slice(name), hashlib.sha256()
    count, *rest = rows.get_shape()
    block = max(1, BLOCK_BYTES // (4 * math.prod(rest)))
    for start in range(0, count, block):
        found.update(np.ascontiguousarray(rows[start : min(start + block, count)]).data)
    return found.hexdigest()


def _read_tensors(path: Path, card: SaeCard) -> dict[str, np.ndarray]:
    with _checked(path, card) as file:
        return {TENSORS[name]: file.get_tensor(name) for name in card.tensors}


def _place_tensors(path: Path, card: SaeCard, mesh: Mesh) -> dict[str, Array]:
    """Every shard read from the file by itself."""

    def place(file: Any, name: str) -> Array:
        rows, placement = file.get_slice(name), sharding(mesh, *SAE.SPECS[TENSORS[name]])
        return jax.make_array_from_callback(tuple(rows.get_shape()), placement, lambda index: rows[index])

    with _checked(path, card) as file:
        return {TENSORS[name]: place(file, name) for name in card.tensors}


@contextmanager
def _checked(path: Path, card: SaeCard) -> Iterator[Any]:
    """The file, open, once its shapes and digests are those of the card. Raises UserError when they are not."""
    wide, flat = (card.features, card.d_model), (card.features,)
    shapes = {"W_dec": wide, "b_enc": flat, "b_dec": (card.d_model,), "W_enc": wide, "threshold": flat}
    shapes = {name: shape for name, shape in shapes.items() if name in card.tensors}
    remedy = "copy the SAE again, or delete its folder and run `fac train`"
    try:
        with safe_open(path, framework="numpy") as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            if there != shapes:
                raise UserError(f"{path} holds {there}, its config.json says {shapes}: {remedy}")
            for name in shapes:
                if (found := _sha256(file, name)) != card.tensors[name]:
                    raise UserError(
                        f"{path} is damaged: {name} has SHA-256 {found}, not {card.tensors[name]}: {remedy}"
                    )
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): {remedy}") from None
