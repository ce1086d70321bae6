"""Explanations without a language model to write them: over-represented tokens, and the logit lens.

- *Fires on*: tokens that hold a feature's peaks more often than the corpus holds them, by log-odds with an informative
  Dirichlet prior (Monroe, Colaresi, Quinn 2008, "Fightin' Words", equations 16 and 22).
- *Promotes*: tokens whose logits the feature's decoder direction raises most, through final norm and unembedding.
The first list is made from half of the documents; `scores/` test it on the other half.

Reads nothing and writes nothing; `explain.py` does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, Int64
from scipy.sparse import coo_array, csr_array
from transformers import PreTrainedTokenizerFast

from fac_jax.backbone.weights import Loaded
from fac_jax.features.spans import Passages
from fac_jax.mesh import DATA
from fac_jax.progress import progress
from fac_jax.sae.checkpoint import LoadedSae
from fac_jax.sae.topk import top_k
from fac_jax.scan.product import Scan
from fac_jax.scan.spans import decode

PRIOR_TOKENS = 10.0
"""Weight of the prior: as many tokens, distributed as in the corpus, are added to either side."""
SURE = 1.96
"""Standard errors by which a token's log-odds must exceed 0 to be named."""
PROMOTED = 4
"""Tokens named by the logit lens."""
LENS_ELEMENTS = 2**25  # of logits [features, vocabulary] at a time: 128 MiB


def token_counts(passages: Passages) -> csr_array:
    """How often document n holds token v in its content, int32 [documents, vocabulary in use]."""
    content = passages.content_t
    tokens = passages.token_t[content]
    documents = np.repeat(np.arange(len(passages.explaining_n)), np.diff(passages.start_n))[content]
    shape = (len(passages.explaining_n), int(tokens.max(initial=0)) + 1)
    return coo_array((np.ones(len(tokens), np.int32), (documents, tokens)), shape=shape).tocsr()


def named_tokens(passages: Passages, held_nv: csr_array, limit: int) -> list[list[int]]:
    """The tokens that explain each feature: over-represented in the explaining half of the documents.

    A feature that is active in none of them is explained from the others, and must not be scored there.
    """
    halves = passages.explaining_n, ~passages.explaining_n
    named, others = (fires_on(passages.scan, held_nv, limit, half_n) for half_n in halves)
    unseen_f = passages.first_f[:-1] == passages.heldout_f
    return [others[feature] if unseen_f[feature] else tokens for feature, tokens in enumerate(named)]


def over_represented(peak_tokens_fv: csr_array, corpus_v: Int64[np.ndarray, " v"], limit: int) -> list[list[int]]:
    """Per feature, at most `limit` tokens that hold its peaks more often than chance, surest first.

    `peak_tokens_fv` counts documents in which feature f peaks at token v, `corpus_v` all content tokens.
    """
    count_f = peak_tokens_fv.sum(axis=1)
    row = np.repeat(np.arange(peak_tokens_fv.shape[0]), np.diff(peak_tokens_fv.indptr))
    token = peak_tokens_fv.indices
    prior = PRIOR_TOKENS * corpus_v[token] / corpus_v.sum()
    here, there = peak_tokens_fv.data + prior, corpus_v[token] + prior
    odds_here = np.log(here / (count_f[row] + PRIOR_TOKENS - here))
    odds_there = np.log(there / (corpus_v.sum() + PRIOR_TOKENS - there))
    z = (odds_here - odds_there) / np.sqrt(1 / here + 1 / there)
    order = np.lexsort((token, -z, row))
    named: list[list[int]] = [[] for _ in count_f]
    for at in order[z[order] > SURE].tolist():
        if len(named[row[at]]) < limit:
            named[row[at]].append(int(token[at]))
    return named


def peak_tokens(scan: Scan, among_n: Bool[np.ndarray, " n"], vocabulary: int) -> csr_array:
    """Documents of `among_n` in which feature f peaks at token v."""
    row = np.repeat(np.arange(scan.peaks_nf.shape[0]), np.diff(scan.peaks_nf.indptr))
    taken = among_n[row]
    at = (scan.peaks_nf.indices[taken], scan.token_ids_m[taken])
    ones = np.ones(int(taken.sum()), np.int64)
    return coo_array((ones, at), shape=(scan.identity.features, vocabulary)).tocsr()


def fires_on(scan: Scan, held_nv: csr_array, limit: int, among_n: Bool[np.ndarray, " n"]) -> list[list[int]]:
    """`over_represented` tokens of every feature over some of the documents."""
    corpus_v = held_nv[np.flatnonzero(among_n)].sum(axis=0).astype(np.int64)
    return over_represented(peak_tokens(scan, among_n, len(corpus_v)), corpus_v, limit)


def promotes(loaded: Loaded, sae: LoadedSae, limit: int = PROMOTED) -> Int[np.ndarray, "f k"]:
    """Tokens whose logits each feature's decoder direction raises most (`loaded` must be the whole model).

    Subtracting each token's mean over the features, so that a token that most of them raise is named less, was tried:
    it changes next to nothing.
    """
    logits_of, shards = loaded.logits_fn(), loaded.mesh.shape[DATA]
    w_fd = np.asarray(sae.sae.w_fd[...])
    step = max(1, LENS_ELEMENTS // (loaded.config.vocab * shards))
    rows = shards * step
    padded = np.zeros((-(-len(w_fd) // rows) * rows, w_fd.shape[1]), np.float32)
    padded[: len(w_fd)] = w_fd
    blocks = padded.reshape(-1, shards, step, w_fd.shape[1])
    best = []
    with progress("explain", len(w_fd), "features") as bar:
        for block in blocks:
            best.append(np.asarray(_best(logits_of(block), limit)).reshape(rows, limit))
            bar.advance(rows)
    return np.concatenate(best)[: len(w_fd)]


@partial(jax.jit, static_argnums=1)
def _best(logits_btv: Array, limit: int) -> Array:
    return top_k(logits_btv.reshape(-1, logits_btv.shape[-1]), limit)[1]


def wording(fires: Sequence[str], promoted: Sequence[str]) -> str | None:
    """`fires on: " kill", " gun"; promotes: " weapon"`; None when no token stands out where the feature fires."""
    if not fires:
        return None
    quoted = [", ".join(json.dumps(token, ensure_ascii=False) for token in tokens) for tokens in (fires, promoted)]
    return f"fires on: {quoted[0]}; promotes: {quoted[1]}"


def decoded(tokens: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Each token as text."""
    return [decode(np.array([token]), tokenizer) for token in tokens]
