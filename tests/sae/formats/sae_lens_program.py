"""Runs under an interpreter that has sae-lens, and imports nothing of fac_jax. Called by test_sae_lens_itself.py.

    python sae_lens_program.py write DIR     SAEs of every kind as SAELens saves them, each with what it makes of x
    python sae_lens_program.py read DIR      every SAE that fac_jax wrote into DIR: what SAELens makes of x

Beside the SAE stand expected.npz (write) or found.npz (read): x [b, d], acts [b, f], recon [b, d].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

D, F, K = 16, 64, 5


def shape(**changes: object) -> dict[str, object]:
    metadata = SAEMetadata(model_name="tiny", hook_name="blocks.2.hook_resid_post", hook_head_index=None)
    return {"d_in": D, "d_sae": F, "metadata": metadata, **changes}


def rows() -> torch.Tensor:
    return 3 * torch.randn(32, D, generator=torch.Generator().manual_seed(1))


def randomised(sae: SAE) -> SAE:
    """Every parameter random, decoder rows of very different norms."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / (1 if parameter.ndim == 1 else 4))
            if name == "threshold":
                parameter.abs_()
        sae.W_dec.mul_(torch.linspace(0.2, 3, F)[:, None])
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(1.25)
    return sae


def expect(folder: Path, sae: SAE, name: str = "expected") -> None:
    x = rows()
    with torch.no_grad():
        acts = sae.encode(x)
        recon = sae.decode(acts)
    np.savez(folder / f"{name}.npz", x=x.numpy(), acts=acts.numpy(), recon=recon.numpy())


def loaded(folder: Path) -> SAE:
    return SAE.load_from_disk(folder, dtype="float32")


def write(root: Path) -> None:
    plain = {
        "standard": StandardSAE(StandardSAEConfig(**shape())),
        "standard-raw-input": StandardSAE(StandardSAEConfig(**shape(apply_b_dec_to_input=False))),
        "topk": TopKSAE(TopKSAEConfig(**shape(k=K))),
        "topk-raw-input": TopKSAE(TopKSAEConfig(**shape(k=K, apply_b_dec_to_input=False))),
        "topk-rescaled": TopKSAE(TopKSAEConfig(**shape(k=K, rescale_acts_by_decoder_norm=True))),
        "topk-rescaled-raw": TopKSAE(
            TopKSAEConfig(**shape(k=K, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False))
        ),
        "topk-checkpoint": TopKTrainingSAE(TopKTrainingSAEConfig(**shape(k=K))),
        "topk-half": TopKSAE(TopKSAEConfig(**shape(k=K, dtype="bfloat16"))),
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**shape())),
        "jumprelu-raw-input": JumpReLUSAE(JumpReLUSAEConfig(**shape(apply_b_dec_to_input=False))),
        "jumprelu-checkpoint": JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**shape())),
    }
    for name, sae in plain.items():
        randomised(sae).save_model(root / name)
        expect(root / name, loaded(root / name))

    trained = {
        "topk-trained": TopKTrainingSAE(TopKTrainingSAEConfig(**shape(k=K))),
        "jumprelu-trained": JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**shape())),
        "batchtopk-trained": BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape(k=K))),
        "matryoshka-trained": MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(**shape(k=K, matryoshka_widths=[16, F]))
        ),
    }
    for name, sae in trained.items():
        randomised(sae).save_inference_model(root / name)
        expect(root / name, loaded(root / name))

    for name, config in (
        ("topk-scaled", TopKSAEConfig(**shape(k=K, normalize_activations="expected_average_only_in"))),
        (
            "topk-scaled-rescaled-raw",
            TopKSAEConfig(
                **shape(
                    k=K,
                    rescale_acts_by_decoder_norm=True,
                    apply_b_dec_to_input=False,
                    normalize_activations="expected_average_only_in",
                )
            ),
        ),
    ):
        sae = randomised(TopKSAE(config))
        sae.save_model(root / name)
        (root / name / "activation_scaler.json").write_text('{"scaling_factor": 0.37, "has_whitening": false}')
        sae.fold_activation_norm_scaling_factor(0.37)
        expect(root / name, sae)

    older = root / "jumprelu-log"
    randomised(JumpReLUSAE(JumpReLUSAEConfig(**shape()))).save_model(older)
    weights = load_file(older / "sae_weights.safetensors")
    weights["log_threshold"] = weights.pop("threshold").log()
    sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**shape()))  # what still reads it
    save_file(weights, older / "sae_weights.safetensors")
    sae.load_weights_from_checkpoint(older)
    expect(older, sae)

    version_5 = root / "topk-version-5"
    randomised(TopKSAE(TopKSAEConfig(**shape(k=K)))).save_model(version_5)
    config = {"d_in": D, "d_sae": F, "dtype": "float32", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    config |= {"model_name": "tiny", "hook_point": "blocks.3.hook_resid_pre", "normalize_activations": False}
    (version_5 / "cfg.json").write_text(json.dumps(config))
    expect(version_5, loaded(version_5))

    refused = {
        "gated": GatedSAE(GatedSAEConfig(**shape())),
        "transcoder": Transcoder(TranscoderConfig(**shape(d_out=D, apply_b_dec_to_input=False))),
        "batchtopk": BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape(k=K))),
        "layer_norm": TopKSAE(TopKSAEConfig(**shape(k=K, normalize_activations="layer_norm"))),
        "constant_norm_rescale": TopKSAE(TopKSAEConfig(**shape(k=K, normalize_activations="constant_norm_rescale"))),
        "expected_average_only_in": TopKSAE(
            TopKSAEConfig(**shape(k=K, normalize_activations="expected_average_only_in"))
        ),
    }
    for name, sae in refused.items():
        sae.save_model(root / "refused" / name)


def read(root: Path) -> None:
    for config in root.glob("*/cfg.json"):
        sae = SAE.load_from_disk(config.parent)
        expect(config.parent, sae, "found")
        described = {"class": type(sae).__name__, "k": getattr(sae.cfg, "k", None), **sae.cfg.metadata.to_dict()}
        (config.parent / "described.json").write_text(json.dumps(described))


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
