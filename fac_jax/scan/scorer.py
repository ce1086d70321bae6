"""Backbone and SAE as one scorer: batches to tables of peaks, for a scan; and texts that were just written to their
peaks, exactly as a scan would find them.

Reads the backbone below the SAE's layer and the SAE; writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from scipy.sparse import csr_array, vstack

from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.config.activations import BackboneConfig
from fac_jax.config.file import Config
from fac_jax.llm.client import Directions
from fac_jax.mesh import own_mesh
from fac_jax.packing import EncodedDocument, PackedBatch, encode_all, pack
from fac_jax.sae.checkpoint import LoadedSae, load_sae
from fac_jax.scan.peaks import Acts, Table, collect, dispatch
from fac_jax.scan.product import Scan, check_sae
from fac_jax.text import Turn, make_document

Score = Callable[[Sequence[str]], csr_array]
"""Texts to their peaks on every feature, float32 [texts, features]."""


@dataclass(frozen=True)
class Scorer:
    """Backbone and SAE in memory, as a `Score` of texts as user turns."""

    loaded: Loaded
    sae: LoadedSae
    acts: Acts
    geometry: BackboneConfig
    max_tokens: int
    """Of each text, its template included, that are read."""

    def __call__(self, texts: Sequence[str]) -> csr_array:
        """Peaks of texts."""
        documents = (make_document([Turn("user", text)], None, "written") for text in texts)
        encoded = list(encode_all(documents, self.loaded.tokenizer, self.max_tokens))
        return peaks_of(encoded, self.loaded, self.sae, self.acts, self.geometry)

    @property
    def directions(self) -> Directions:
        """What a writer is steered by, towards features of the SAE."""
        return Directions(self.sae.layer, lambda features: np.asarray(self.sae.sae.w_fd[...][np.asarray(features)]))


def load_scorer(config: Config, inputs: Mapping[str, Path]) -> tuple[Loaded, LoadedSae]:
    """The backbone up to `backbone.layer` and the SAE of `scan.sae` or of the run, checked to fit each other."""
    mesh = own_mesh(config.mesh, jax.local_devices())
    loaded = load_backbone(config.backbone.model, config.backbone.layer, config.backbone.dtype, mesh)
    folder = Path(config.scan.sae) if config.scan.sae else inputs["sae"]
    return loaded, load_sae(folder, mesh, loaded.config.d_model, config.backbone.layer, loaded.digest)


def dispatched(
    corpus: Iterable[PackedBatch], loaded: Loaded, sae: LoadedSae, acts: Acts
) -> Iterator[tuple[PackedBatch, list[Table]]]:
    """Each batch with its tables. The device works on the next batch while the caller looks at this one."""
    waiting = None
    for batch in corpus:
        started = (batch, dispatch(batch, loaded, sae, acts))
        if waiting is not None:
            yield waiting
        waiting = started
    if waiting is not None:
        yield waiting


def peaks_of(
    encoded: Sequence[EncodedDocument], loaded: Loaded, sae: LoadedSae, acts: Acts, geometry: BackboneConfig
) -> csr_array:
    """Peaks above 0 of documents held in memory, float32 [documents, features]: how synthesis scores candidates."""
    rows = [csr_array((0, sae.features), dtype=np.float32)]
    corpus = pack(encoded, geometry.rows_per_batch, geometry.row_tokens)
    for batch, tables in dispatched(corpus, loaded, sae, acts):
        found, shape = collect(batch, tables), (len(batch.documents), sae.features)
        rows.append(csr_array((found.peak, (found.document, found.feature)), shape=shape))
    return csr_array(vstack(rows, format="csr"))


def open_scorer(config: Config, inputs: Mapping[str, Path], anchor: Scan, cut_as: str) -> Scorer:
    """Score texts, cut at as many tokens as the documents of data set `cut_as`.

    Raises UserError when the SAE is another one than the anchor was scanned with.
    """
    loaded, sae = load_scorer(config, inputs)
    check_sae(anchor, sae.digest)
    return Scorer(loaded, sae, config.scan.acts, config.backbone, config.dataset(cut_as).max_tokens)
