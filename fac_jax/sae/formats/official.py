"""The checkpoints that the paper's authors published: sae_llama_l16_h65536 and others, files named *.pth.

    TopK7_l{layer}_h{d_model}_epoch{n}.pth     {"weight": {mask [f], W_enc [d, f], b_enc [f], b_dec [d]},
                                                "config": {d_inp, d_hide, topK}}

The 7 is not K and the h is the backbone's width. `topK` is K at the moment of saving, so a file from within the
annealing (200 -> 20) holds a larger one than the SAE was trained for. The layer counts blocks applied, as ours does.
The decoder is the transposed encoder. `mask` edits activations after top-k, so that a feature it switches off still
takes one of the K places: an SAE has no such thing here, and a mask that is not all ones is refused.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np

from fac_jax.errors import UserError
from fac_jax.sae.formats.torch_file import read_torch

log = logging.getLogger(__name__)
SHAPES = {"mask": "f", "W_enc": "df", "b_enc": "f", "b_dec": "d"}


def read_official(path: Path, k: int | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by attribute of `SAE`, float32, and the fields of its card; `k` replaces the K of the file.

    Raises UserError when the file cannot be read without executing it, lacks something, has wrong shapes, switches
    features off, or does not say its layer in its name.
    """
    content = read_torch(path)
    weight = _part(path, content, "weight")
    config = _part(path, content, "config")
    features, d_model = _whole(path, config, "d_hide"), _whole(path, config, "d_inp")
    sizes = {"d": d_model, "f": features}
    wanted = {name: tuple(sizes[axis] for axis in axes) for name, axes in SHAPES.items()}
    found = {name: np.shape(value) if isinstance(value, np.ndarray) else None for name, value in weight.items()}
    if found != wanted:
        raise UserError(
            f"{path} holds {found} for d_inp {d_model} and d_hide {features}; a checkpoint of the published "
            f"code holds {wanted}"
        )
    arrays = {name: weight[name].astype(np.float32, copy=False) for name in wanted}
    if off := int((arrays["mask"] != 1).sum()):
        raise UserError(
            f"{path} has a mask that is not 1 for {off} of {features} features: they would still take places among "
            "the K, which an SAE here cannot express; set the mask to ones, or use a file without edits"
        )
    layer = re.search(r"_l(\d+)_", path.name)
    if layer is None:
        raise UserError(
            f"{path} does not say which layer it reads: rename it to TopK7_l{{layer}}_h{d_model}_epoch{{n}}.pth, "
            "the layer counted in blocks applied"
        )
    if k is None and "topK" not in config:
        raise UserError(f"{path} has no config.topK: give the K with `fac convert --sae {path} --to FOLDER --k K`")
    if k is None:
        k = _whole(path, config, "topK")
        log.info(
            f"{path.name}: K is {k}, as when the file was saved; training lowers K (from 200 to 20 in the paper), and "
            "`fac convert --sae` writes this SAE with another --k"
        )
    card = {"k": k, "layer": int(layer[1]), "model": None, "variant": "topk"}
    return {
        "w_fd": np.ascontiguousarray(arrays["W_enc"].T),
        "b_enc_f": arrays["b_enc"],
        "b_dec_d": arrays["b_dec"],
    }, card


def _part(path: Path, content: Any, name: str) -> dict[str, Any]:
    part = content.get(name) if isinstance(content, dict) else None
    if not isinstance(part, dict):
        there = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} has no {name!r} (it holds {there}): it is no checkpoint of the published code")
    return part


def _whole(path: Path, config: dict[str, Any], name: str) -> int:
    """A whole number, which may be saved as a tensor."""
    value = config.get(name)
    number = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if type(number) is not int or number < 1:
        raise UserError(f"{path} has config.{name} {value!r}; it must be a whole number above 0")
    return number
