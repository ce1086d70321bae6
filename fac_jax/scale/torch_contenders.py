"""One torch training step of a Top-K autoencoder in a process of its own: the peers of `fac bench sae`.

Run by path with whatever Python has the peers installed, so it imports nothing of fac_jax:

    python torch_contenders.py '{"contender": "sparsify", "d_model": 768, "features": 16384, "batch": 1024, "k": 32,
                                 "dtype": "bfloat16", "device": "cpu", "warm_up": 4, "steps": 4}'

The last line it prints is JSON: seconds of each step, peak memory in bytes, the last loss; or why it cannot run.
sparsify, sae_lens and dictionary_learning are the published packages, called as their own trainers call them, with
torch's Adam where the package leaves the choice. `official` re-states the maths of the published FAC-Synthesis code.
`hand_tuned` is the same maths as fast as torch could be made to do it: what fac_jax has to beat.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from importlib import metadata
from typing import Any

import torch
from torch.nn import functional

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**28}
"""Of gathered rows at a time: what a processor's caches hold, or 1 GiB."""

Step = Callable[[torch.Tensor], float]


def adam(parameters: Iterable[torch.nn.Parameter], fused: bool = True) -> torch.optim.Adam:
    """Adam with the published code's constants."""
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.9, 0.999), eps=6.25e-10, fused=fused)


def sparsify(d: int, features: int, k: int, autocast: Callable[[], AbstractContextManager]) -> Step:
    """EleutherAI's sparsify: sparse encoder gradient by index_add, decoder by embedding_bag (untied)."""
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    model = SparseCoder(d, SparseCoderConfig(num_latents=features, k=k), device=torch.get_default_device())
    optimizer = adam(model.parameters())

    def step(x_bd: torch.Tensor) -> float:
        with autocast():
            loss = model(x_bd).fvu
        loss.backward()
        model.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        model.set_decoder_norm_to_unit_norm()
        return loss.item()

    return step


def sae_lens(d: int, features: int, k: int, autocast: Callable[[], AbstractContextManager]) -> Step:
    """SAELens's TopKTrainingSAE (untied)."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    model = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=features, k=k, device=str(torch.get_default_device())))
    optimizer = adam(model.parameters())
    dead_f = torch.zeros(features, dtype=torch.bool)

    def step(x_bd: torch.Tensor) -> float:
        given = TrainStepInput(
            sae_in=x_bd, coefficients={}, dead_neuron_mask=dead_f, n_training_steps=1, is_logging_step=False
        )
        with autocast():
            loss = model.training_forward_pass(given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def dictionary_learning(d: int, features: int, k: int, autocast: Callable[[], AbstractContextManager]) -> Step:
    """dictionary_learning's TopKTrainer, its whole `update` (untied)."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10_000,
        activation_dim=d,
        dict_size=features,
        k=k,
        layer=0,
        lm_name="none",
        lr=1e-3,
        device=str(torch.get_default_device()),
    )
    done = iter(range(10_000))

    def step(x_bd: torch.Tensor) -> float:
        with autocast():
            return float(trainer.update(next(done), x_bd))

    return step


def official(d: int, features: int, k: int, autocast: Callable[[], AbstractContextManager]) -> Step:
    """The published maths by autograd: tied, dense masked activations, normalised loss, Adam."""
    w_df = torch.nn.Parameter(torch.randn(d, features) * (2 / d) ** 0.5)
    b_enc_f, b_dec_d = (torch.nn.Parameter(torch.zeros(n)) for n in (features, d))
    optimizer = adam([w_df, b_enc_f, b_dec_d], fused=False)

    def step(x_bd: torch.Tensor) -> float:
        with autocast():
            pre_bf = (x_bd - b_dec_d) @ w_df + b_enc_f
            val_bk, idx_bk = torch.topk(pre_bf, k)
            acts_bf = torch.relu(torch.zeros_like(pre_bf).scatter(1, idx_bk, val_bk))
            y_bd = acts_bf @ w_df.T + b_dec_d
        loss = (((y_bd.float() - x_bd) ** 2).mean(1) / (x_bd**2).mean(1)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def hand_tuned(d: int, features: int, k: int, autocast: Callable[[], AbstractContextManager]) -> Step:
    """The same maths by hand: one dense matmul, embedding_bag, index_add in chunks, fused Adam (tied)."""
    w_fd = torch.nn.Parameter(functional.normalize(torch.randn(features, d), dim=1))
    b_enc_f, b_dec_d = (torch.nn.Parameter(torch.zeros(n)) for n in (features, d))
    optimizer = adam([w_fd, b_enc_f, b_dec_d])
    dw_fd, db_enc_f, db_dec_d = (torch.zeros_like(one) for one in (w_fd, b_enc_f, b_dec_d))
    w_fd.grad, b_enc_f.grad, b_dec_d.grad = dw_fd, db_enc_f, db_dec_d

    @torch.no_grad()
    def step(x_bd: torch.Tensor) -> float:
        batch = len(x_bd)
        centred_bd = x_bd - b_dec_d
        with autocast():
            pre_bf = functional.linear(centred_bd, w_fd, b_enc_f)
        val_bk, idx_bk = torch.topk(pre_bf, k, sorted=False)
        acts_bk = torch.relu(val_bk.float())
        e_bd = functional.embedding_bag(idx_bk, w_fd, per_sample_weights=acts_bk, mode="sum") + b_dec_d - x_bd
        square_b = (x_bd**2).mean(1)
        loss = ((e_bd**2).mean(1) / square_b).mean()
        g_bd = e_bd * (2 / (d * batch) / square_b)[:, None]
        dw_fd.zero_()
        db_enc_f.zero_()
        rows = max(1, CHUNK_ELEMENTS[w_fd.device.type] // (k * d))
        for start in range(0, batch, rows):
            cut = slice(start, start + rows)
            flat, acts = idx_bk[cut].reshape(-1), acts_bk[cut]
            v_bk = torch.bmm(w_fd[idx_bk[cut]], g_bd[cut, :, None])[:, :, 0] * (acts > 0)
            dw_bkd = torch.baddbmm(acts[:, :, None] * g_bd[cut, None], v_bk[:, :, None], centred_bd[cut, None])
            dw_fd.index_add_(0, flat, dw_bkd.view(-1, d))
            db_enc_f.index_add_(0, flat, v_bk.reshape(-1))
        db_dec_d.copy_(g_bd.sum(0) - db_enc_f @ w_fd)
        optimizer.step()
        return loss.item()

    return step


CONTENDERS = {
    "hand_tuned": hand_tuned,
    "official": official,
    "sparsify": sparsify,
    "sae_lens": sae_lens,
    "dictionary_learning": dictionary_learning,
}
PACKAGES = {"sparsify": "eai-sparsify", "sae_lens": "sae-lens", "dictionary_learning": "dictionary-learning"}


def main() -> None:
    """Time the contender that the argument names."""
    asked = json.loads(sys.argv[1])
    package = PACKAGES.get(asked["contender"], "torch")
    device = "cuda" if asked["device"] == "gpu" else "cpu"
    torch.set_default_device(device)
    torch.manual_seed(0)

    def autocast() -> AbstractContextManager:
        return torch.autocast(device, torch.bfloat16, enabled=asked["dtype"] == "bfloat16")

    try:
        version = metadata.version(package)
        step = CONTENDERS[asked["contender"]](asked["d_model"], asked["features"], asked["k"], autocast)
    except ImportError as error:
        print(json.dumps({"absent": f"{package} cannot be imported here ({error})"}))
        return
    x_nbd = torch.randn(2, asked["batch"], asked["d_model"])
    seconds: list[float] = []
    loss = float("nan")
    for i in range(asked["warm_up"] + asked["steps"]):
        started = time.perf_counter()
        loss = step(x_nbd[i % 2])
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else of_process
    found: dict[str, Any] = {"seconds": seconds[asked["warm_up"] :], "peak_bytes": peak, "loss": loss}
    print(json.dumps({**found, "version": f"{package} {version}"}))


if __name__ == "__main__":
    main()
