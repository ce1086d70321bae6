"""`fac convert --sae`: an SAE from any form that `source.py` knows into a folder of ours or of SAELens's.

The same features are active with the same values, and they reconstruct the same residual, up to float32's rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fac_jax.runs import writing_folder
from fac_jax.sae.checkpoint import SaeCard, read_sae, save_sae
from fac_jax.sae.formats.sae_lens import write_sae_lens
from fac_jax.sae.formats.source import UNNAMED
from fac_jax.sae.model import SAE

Form = Literal["fac", "sae_lens"]
FROM_ARRAYS = ("format", "features", "d_model", "tensors")
"""Fields of the card that `save_sae` fills in itself."""


def convert_sae(source: str | Path, folder: str | Path, form: Form = "fac", k: int | None = None) -> SaeCard:
    """Write the SAE at `source` into `folder`, which appears only when it is whole; returns the SAE's card.

    `k` replaces the K of a Top-K SAE. Raises UserError for what `load_sae` raises it for, a `k` that does not fit, and
    a folder that already holds something.
    """
    card, arrays = read_sae(source, k)
    with writing_folder(Path(folder)) as partial:
        if form == "fac":
            save_sae(partial, SAE(**arrays), {name: v for name, v in vars(card).items() if name not in FROM_ARRAYS})
        else:
            model = None if card.model == UNNAMED else card.model
            write_sae_lens(partial, arrays, card.k, card.layer, model, card.variant)
    return card
