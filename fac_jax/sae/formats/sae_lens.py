"""SAELens's folder format (checked against sae-lens 6.54), read and written; its other conventions are folded away.

    cfg.json                     architecture, sizes, switches; metadata: model_name, hook_name, hook_head_index, ...
    sae_weights.safetensors      W_enc [d, f], b_enc [f], W_dec [f, d], b_dec [d], and threshold [f] for jumprelu

SAELens computes pre = (x - b_dec) W_enc + b_enc and x_hat = acts W_dec + b_dec as we do, with switches that are folded
into the weights here, so that activations and reconstructions stay its own (as it computes them in float32):

    apply_b_dec_to_input false       pre = x W_enc + b_enc                 b_enc + b_dec W_enc
    rescale_acts_by_decoder_norm     acts = topk(n pre), n = |W_dec[f]|    n W_enc, n b_enc, W_dec / n
    expected_average_only_in         x was scaled by s for training        s W_enc, W_dec / s, b_dec / s
    log_threshold                    older jumprelu files                  exp(log_threshold)

s stands in the activation_scaler.json of a checkpoint; SAELens folds it in itself when training ends. What depends on
each row (layer_norm, constant_norm_rescale) is no SAE of ours and is refused, and so is all that SAELens has under
other architectures. BatchTopK and Matryoshka SAEs are jumprelu once SAELens has saved them for inference.

Hooks: our layer counts blocks applied, so blocks.{L-1}.hook_resid_post and blocks.{L}.hook_resid_pre are layer L.
(TransformerLens leaves the residual of RMSNorm models, which all our backbones are, as Hugging Face has it.)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fac_jax.errors import UserError, first_line

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
VERSION = "6.54.12"
"""Of SAELens, whose format is written."""
SHAPES = {"W_enc": "df", "b_enc": "f", "W_dec": "fd", "b_dec": "d"}
ARCHITECTURES = ("standard", "topk", "jumprelu")
_PER_ROW = "scales each row by its own statistics, which cannot be folded into weights"
NORMALIZATIONS = {
    "layer_norm": f"{_PER_ROW}: such an SAE cannot be read",
    "constant_norm_rescale": f"{_PER_ROW}: such an SAE cannot be read",
    "covariance_whitening": "is a training checkpoint's: call fold_activation_whitening in SAELens and save it again",
}


def read_sae_lens(folder: Path, k: int | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by attribute of `SAE`, float32, and the fields of its card; `k` replaces the K of a topk SAE.

    Raises UserError naming what cannot be expressed: another architecture, a normalisation that is not folded in, a
    hook that is no residual stream, a file that is damaged or lacks something.
    """
    path = folder / CONFIG
    config = _read_config(path)
    architecture = config["architecture"]
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path} has architecture {architecture!r}, which is not read; {list(ARCHITECTURES)} are"
            + (": save it with save_inference_model, as jumprelu" if "batchtopk" in str(architecture) else "")
        )
    for switch, harmless in (("reshape_activations", "none"), ("hook_head_index", None)):
        if config[switch] != harmless:
            raise UserError(
                f"{path} has {switch} {config[switch]!r}: it reads attention heads, not the residual stream"
            )
    layer = _layer(path, config["hook_name"])
    sizes = {"d": _whole(path, config, "d_in"), "f": _whole(path, config, "d_sae")}
    if architecture != "topk":
        k = None
    elif k is None:
        k = _whole(path, config, "k")
    weights = _read_weights(folder / WEIGHTS, sizes, architecture == "jumprelu")
    if config["normalize_activations"] != "none":
        _fold_scale(folder, config["normalize_activations"], weights)
    if architecture == "topk" and config["rescale_acts_by_decoder_norm"]:
        _fold_norms(weights)
    if not config["apply_b_dec_to_input"]:
        shift_f = np.einsum("d,df->f", weights["b_dec"], weights["W_enc"], dtype=np.float64)
        weights["b_enc"] = (weights["b_enc"] + shift_f).astype(np.float32)
    if architecture == "standard":
        weights["threshold"] = np.zeros(sizes["f"], np.float32)
    variant = config["training_architecture"] or architecture
    return _ours(weights), {"k": k, "layer": layer, "model": config["model_name"], "variant": variant}


def write_sae_lens(
    folder: Path, arrays: Mapping[str, np.ndarray], k: int | None, layer: int, model: str | None, variant: str
) -> None:
    """Write cfg.json and the weights into `folder`; `arrays` by attribute of `SAE`. Nothing is normalised, so that the
    same features are active: as topk with k, or as jumprelu where there is a threshold."""
    w_fd = arrays["w_fd"]
    encoder_fd = arrays.get("w_enc_fd", w_fd)
    weights = {
        "W_enc": encoder_fd.T, "b_enc": arrays["b_enc_f"], "W_dec": w_fd, "b_dec": arrays["b_dec_d"]
    }  # fmt: skip
    config: dict[str, Any] = {"architecture": "topk", "k": k, "rescale_acts_by_decoder_norm": False}
    if "threshold_f" in arrays:
        config = {"architecture": "jumprelu"}
        weights["threshold"] = arrays["threshold_f"]
    features, d_model = w_fd.shape
    config |= {
        "d_in": d_model,
        "d_sae": features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": VERSION,
            "model_name": model,
            "hook_name": f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre",
            "hook_head_index": None,
            "training_architecture": variant,
        },
    }
    save_file({name: np.ascontiguousarray(array, np.float32) for name, array in weights.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read_config(path: Path) -> dict[str, Any]:
    """cfg.json with SAELens's defaults; before version 6, metadata stood beside the rest and names were others."""
    config = _read_json(path)
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{path} has metadata {metadata!r}; it must be a mapping")
    version = re.match(r"\d+", str(config.get("sae_lens_version") or metadata.get("sae_lens_version")))
    if version is None or int(version[0]) < 6:
        metadata = {**config, "hook_name": config.get("hook_name", config.get("hook_point"))}
        metadata["hook_head_index"] = config.get("hook_head_index", config.get("hook_point_head_index"))
        config.setdefault("architecture", "standard")
        if config.get("activation_fn", config.get("activation_fn_str")) == "topk":
            arguments = config.get("activation_fn_kwargs")
            config |= {"architecture": "topk", "k": arguments.get("k") if isinstance(arguments, dict) else None}
        if "hook_z" in str(metadata["hook_name"]):
            config.setdefault("reshape_activations", "hook_z")
        if isinstance(flag := config.get("normalize_activations"), bool):
            config["normalize_activations"] = "expected_average_only_in" if flag else "none"
    defaults = {"apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False, "reshape_activations": "none"}
    defaults |= {"normalize_activations": "none", "architecture": None, "k": None}
    names = ("model_name", "hook_name", "hook_head_index", "training_architecture")
    config |= {key: value for key, value in defaults.items() if config.get(key) is None}
    config |= {name: metadata.get(name) for name in names}
    kinds = {"apply_b_dec_to_input": bool, "rescale_acts_by_decoder_norm": bool, "model_name": str, names[-1]: str}
    for name, kind in kinds.items():
        if not isinstance(config[name], (kind, type(None))):
            raise UserError(f"{path} has {name} {config[name]!r}; it must be {kind.__name__}")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the SAE's folder again") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({first_line(error)}): copy the SAE's folder again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping but {type(content).__name__}: copy the SAE's folder again")
    return content


def _layer(path: Path, hook: Any) -> int:
    """Blocks applied at a hook, named as in TransformerLens or as a module of Hugging Face."""
    if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", str(hook)):
        return int(found[1]) + (found[2] == "post")
    if found := re.fullmatch(r"(?:.*\.)?layers\.(\d+)", str(hook)):
        return int(found[1]) + 1
    raise UserError(
        f"{path} has hook_name {hook!r}, which is no residual stream between blocks: "
        "blocks.N.hook_resid_post, blocks.N.hook_resid_pre and model.layers.N are read"
    )


def _whole(path: Path, config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise UserError(f"{path} has {name} {value!r}; it must be a whole number above 0")
    return value


def _read_weights(path: Path, sizes: Mapping[str, int], thresholds: bool) -> dict[str, np.ndarray]:
    """Tensors by SAELens's names, float32."""
    remedy = "copy the SAE's folder again"
    wanted = {name: tuple(sizes[axis] for axis in axes) for name, axes in SHAPES.items()}
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            if thresholds:
                wanted["log_threshold" if "log_threshold" in shapes else "threshold"] = (sizes["f"],)
            extra = {"scaling_factor"} & shapes.keys()  # SAELens once wrote ones, which mean nothing
            if {name: shape for name, shape in shapes.items() if name not in extra} != wanted:
                raise UserError(f"{path} holds {shapes}, its {CONFIG} says {wanted}: {remedy}")
            weights = {name: np.asarray(file.get_tensor(name), np.float32) for name in shapes}
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): {remedy}") from None
    if extra and not np.allclose(weights.pop("scaling_factor"), 1):
        raise UserError(
            f"{path} holds a scaling_factor that is not 1 (a fine-tuned SAE), which SAELens 6 reads no more"
        )
    if "log_threshold" in weights:
        weights["threshold"] = np.exp(weights.pop("log_threshold"))
    return weights


def _fold_scale(folder: Path, normalization: Any, weights: dict[str, np.ndarray]) -> None:
    path = folder / CONFIG
    if normalization != "expected_average_only_in":
        reason = NORMALIZATIONS.get(str(normalization), "is not known")
        raise UserError(f"{path} has normalize_activations {normalization!r}, which {reason}")
    content = _read_json(folder / SCALER) if (folder / SCALER).is_file() else {}
    scale = content.get("scaling_factor")
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise UserError(
            f"{path} has normalize_activations 'expected_average_only_in' and no factor with it ({SCALER}: "
            f"{content or 'missing'}): call fold_activation_norm_scaling_factor(factor) in SAELens and save it again"
        )
    factor = np.float32(scale)
    weights["W_enc"] = weights["W_enc"] * factor
    weights["W_dec"] = weights["W_dec"] / factor
    weights["b_dec"] = weights["b_dec"] / factor


def _fold_norms(weights: dict[str, np.ndarray]) -> None:
    squares_f = np.einsum("fd,fd->f", weights["W_dec"], weights["W_dec"], dtype=np.float64)
    norms_f = np.sqrt(squares_f).astype(np.float32)
    weights["W_enc"] = weights["W_enc"] * norms_f
    weights["b_enc"] = weights["b_enc"] * norms_f
    weights["W_dec"] = weights["W_dec"] / np.where(norms_f > 0, norms_f, np.float32(1))[:, None]


def _ours(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By attribute of `SAE`; an encoder that is the decoder's transpose is not kept twice."""
    encoder_fd = np.ascontiguousarray(weights["W_enc"].T, np.float32)
    arrays = {
        "w_fd": weights["W_dec"],
        "b_enc_f": weights["b_enc"],
        "b_dec_d": weights["b_dec"],
    }
    if not np.array_equal(encoder_fd, arrays["w_fd"]):
        arrays["w_enc_fd"] = encoder_fd
    if "threshold" in weights:
        arrays["threshold_f"] = weights["threshold"]
    return arrays
