"""Texts that were just written to their peaks, exactly as a scan would find them: nothing is written to disk.

Reads the backbone below the SAE's layer and the SAE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scipy.sparse import csr_array

from fac_jax.config import Config
from fac_jax.packing import encode
from fac_jax.scan.scan import Scan, check_sae, load_scorer, peaks_of
from fac_jax.text import Turn, make_document

Score = Callable[[Sequence[str]], csr_array]
"""Texts to their peaks on every feature, float32 [texts, features]."""


def open_scorer(config: Config, inputs: Mapping[str, Path], anchor: Scan, cut_as: str) -> Score:
    """Score texts as user turns, cut at as many tokens as the documents of data set `cut_as`.

    Raises UserError when the SAE is another one than the anchor was scanned with.
    """
    loaded, sae = load_scorer(config, inputs)
    check_sae(anchor, sae.digest)
    max_tokens = config.dataset(cut_as).max_tokens

    def score(texts: Sequence[str]) -> csr_array:
        documents = (make_document([Turn("user", text)], None, "written") for text in texts)
        encoded = [encode(document, loaded.tokenizer, max_tokens) for document in documents]
        return peaks_of(encoded, loaded, sae, config.scan.acts, config.backbone)

    return score
