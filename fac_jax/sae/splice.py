"""Stage `splice`: how much of the language model's loss survives when its residual passes through the SAE.

    loss_recovered = (ce_ablated - ce_spliced) / (ce_ablated - ce_clean)

after Bricken et al. 2023 (Towards Monosemanticity) and Gao et al. 2024 (arXiv 2406.04093, section 4.1): 1 where the
spliced model predicts as well as the clean one, 0 where it does as badly as with the residual ablated. The literature
ablates to zero, `loss_recovered`; against the mean residual of the training rows, a stricter yardstick, it is called
`loss_recovered_mean`.

Reads the whole backbone, the SAE, the mean in the store's manifest (or that a live training noted), and the first
`splice.documents` documents of the harvested data set that are held out of training. The residual after
`backbone.layer` blocks is replaced on content tokens, the kind that the SAE was trained on, whatever their norm;
template and special tokens keep theirs. Counted are the predictions that content tokens make of content tokens of the
same document.

Writes `splice.json`: the figures, in nats a token, and one greedy answer of the clean and of the spliced model to a
held-out prompt, as the official code prints during training: a sample to look at, not a measurement.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float64
from transformers import PreTrainedTokenizerFast

from fac_jax.activations.harvest import held_out
from fac_jax.activations.live import read_statistics
from fac_jax.activations.manifest import check_holds
from fac_jax.activations.reader import StoreReader
from fac_jax.activations.store import store_of
from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.config.activations import BackboneConfig
from fac_jax.config.file import Config
from fac_jax.errors import UserError
from fac_jax.mesh import DATA, make_mesh
from fac_jax.packing import EncodedDocument, PackedBatch, encodable_documents, encode, pack
from fac_jax.plain import to_plain
from fac_jax.progress import progress
from fac_jax.runs import write_text
from fac_jax.sae.checkpoint import LoadedSae, load_sae
from fac_jax.sae.spliced import WAYS, greedy_answers, token_losses
from fac_jax.text import USER, make_document

log = logging.getLogger(__name__)
PROMPT_TOKENS = 64  # of the sample, at most, if some document has so short a prompt
ROUND = 16  # tokens to which the sample's length is rounded up


@dataclass(frozen=True)
class Figures:
    """Cross entropies in nats, means over `tokens` predictions; loss_recovered as defined above."""

    documents: int
    tokens: int
    """Predictions counted."""
    ce_clean: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float | None
    """None where there is no store to take the mean from (`scan.sae` without `train.store`)."""
    loss_recovered: float | None
    """Against zero ablation. None where ablation does not raise the loss: nothing can then be recovered."""
    loss_recovered_mean: float | None
    """Against mean ablation; None also where `ce_mean` is."""
    kl: float
    """KL(clean || spliced) of the distributions over the vocabulary."""


@dataclass(frozen=True)
class Sample:
    """One prompt and the most probable answer to it; not a measurement."""

    document: str
    """Id of the held-out document that the prompt is the beginning of."""
    prompt: str
    clean: str
    spliced: str


def splice(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage: measure, write `out`/splice.json, return the figures.

    Raises UserError when the data set holds out no document with two content tokens in a row, and for an SAE or a store
    of another model, layer or width.
    """
    mesh = make_mesh(config.mesh)
    loaded = load_backbone(config.backbone.model, None, config.backbone.dtype, mesh)
    folder = config.scan.sae or inputs["sae"]
    sae = load_sae(folder, mesh, loaded.config.d_model, config.backbone.layer, loaded.digest)
    documents = held_out_documents(config, loaded.tokenizer)
    figures = measure(documents, loaded, sae, _training_mean(config, inputs), config.backbone)
    sample = answer(documents, loaded, sae, config.splice.new_tokens)
    log.info("splice, a sample and not a measurement: to %r the model answers %r", sample.prompt, sample.clean)
    log.info("splice, the same with the SAE in it: %r", sample.spliced)  # repr: text cannot steer a terminal
    product = {"data": config.harvest.data, "layer": sae.layer, "sae": sae.digest, **asdict(figures), "sample": sample}
    if jax.process_index() == 0:
        write_text(out / "splice.json", json.dumps(to_plain(product), indent=1, allow_nan=False, ensure_ascii=False))
    return asdict(figures)


def held_out_documents(config: Config, tokenizer: PreTrainedTokenizerFast) -> list[EncodedDocument]:
    """The first `splice.documents` documents of `harvest.data` held out of training, encoded as for it."""
    name, fraction = config.harvest.data, config.harvest.validation_fraction
    dataset = config.dataset(name)
    documents = encodable_documents(dataset, name, tokenizer)
    chosen = (document for document in documents if held_out(document.id, fraction))
    return [encode(document, tokenizer, dataset.max_tokens) for document in islice(chosen, config.splice.documents)]


def measure(
    documents: Sequence[EncodedDocument],
    loaded: Loaded,
    sae: LoadedSae,
    mean_d: Float64[np.ndarray, " d"] | None,
    geometry: BackboneConfig,
) -> Figures:
    """Figures over documents; sums are kept in float64. Raises UserError where there is nothing to predict."""
    mesh, sums, tokens = loaded.mesh, np.zeros(len(WAYS) + 1), 0
    ways = WAYS if mean_d is not None else WAYS[:-1]
    mean = None if mean_d is None else mean_d.astype(np.float32)
    rows = batch_rows(documents, geometry, mesh.shape[DATA])
    with progress("splice", len(documents), "documents") as bar:
        for batch in pack(documents, rows, geometry.row_tokens):
            arrays = (batch.tokens, batch.segments, batch.positions, batch.content)
            losses = token_losses(loaded.model, sae.sae, *arrays, mean, layer=sae.layer, k=sae.k, mesh=mesh)
            counted_bt = counted(batch)
            for place, loss_bt in enumerate(np.asarray(losses.cross_entropy_wbt)):
                sums[place] += loss_bt[counted_bt].sum(dtype=np.float64)
            sums[-1] += np.asarray(losses.divergence_bt)[counted_bt].sum(dtype=np.float64)
            tokens += int(counted_bt.sum())
            bar.advance(len(batch.documents))
    if not tokens:
        raise UserError(
            f"{len(documents)} held-out documents have no two content tokens in a row, so there is nothing to predict: "
            "raise splice.documents or harvest.validation_fraction, or set splice.documents to 0 to go without"
        )
    ce = dict(zip(ways, (sums / tokens).tolist(), strict=False))
    return Figures(
        documents=len(documents),
        tokens=tokens,
        ce_clean=ce["clean"],
        ce_spliced=ce["spliced"],
        ce_zero=ce["zero"],
        ce_mean=ce.get("mean"),
        loss_recovered=loss_recovered(ce["clean"], ce["spliced"], ce["zero"]),
        loss_recovered_mean=loss_recovered(ce["clean"], ce["spliced"], ce["mean"]) if "mean" in ce else None,
        kl=float(sums[-1] / tokens),
    )


def loss_recovered(clean: float, spliced: float, ablated: float) -> float | None:
    """(ablated - spliced) / (ablated - clean), of cross entropies; None where ablation does not raise the loss."""
    return (ablated - spliced) / (ablated - clean) if ablated > clean else None


def counted(batch: PackedBatch) -> Bool[np.ndarray, "b t"]:
    """Tokens whose prediction counts: content, followed in the row by content of the same document."""
    counted_bt = np.zeros(batch.content.shape, bool)
    same_bt = batch.segments[:, :-1] == batch.segments[:, 1:]
    counted_bt[:, :-1] = batch.content[:, :-1] & batch.content[:, 1:] & same_bt
    return counted_bt


def batch_rows(documents: Sequence[EncodedDocument], geometry: BackboneConfig, data: int) -> int:
    """Rows of a batch: backbone.rows_per_batch, or as few as hold all documents; a multiple of mesh.data."""
    if geometry.rows_per_batch % data:
        raise UserError(
            f"{geometry.rows_per_batch} rows do not divide over mesh.data={data}; "
            "set backbone.rows_per_batch to a multiple of it"
        )
    for rows in range(data, geometry.rows_per_batch, data):
        if all(
            len(batch.documents) == len(documents) for batch in islice(pack(documents, rows, geometry.row_tokens), 1)
        ):
            return rows
    return geometry.rows_per_batch


def answer(documents: Sequence[EncodedDocument], loaded: Loaded, sae: LoadedSae, new_tokens: int) -> Sample:
    """Answers of at most `new_tokens` tokens, at temperature 0, to the first of the documents with a short prompt."""
    prompts = [_prompt(item, loaded.tokenizer) for item in documents]
    chosen = next((i for i, (ids, _) in enumerate(prompts) if len(ids) <= PROMPT_TOKENS), None)
    if chosen is None:
        chosen = min(range(len(prompts)), key=lambda i: len(prompts[i][0]))
    ids, content = prompts[chosen]
    end = len(ids) + new_tokens
    if end > loaded.config.max_positions:
        raise UserError(
            f"a prompt of {len(ids)} tokens and splice.new_tokens {new_tokens} exceed the model's context of "
            f"{loaded.config.max_positions}: lower splice.new_tokens"
        )
    size = -(-end // ROUND) * ROUND
    tokens_t, content_t = np.zeros(size, np.int32), np.zeros(size, bool)
    tokens_t[: len(ids)], content_t[: len(ids)] = ids, content
    stop_ids = sorted({*loaded.config.eos_ids, loaded.tokenizer.eos_token_id} - {None})
    stops = np.asarray(stop_ids or [-1], np.int32)
    found = greedy_answers(
        loaded.model, sae.sae, tokens_t, content_t, len(ids), end, stops, layer=sae.layer, k=sae.k
    )  # fmt: skip
    clean, spliced = (_text(row[len(ids) : end], stop_ids, loaded.tokenizer) for row in np.asarray(found).tolist())
    return Sample(
        documents[chosen].document.id,
        str(loaded.tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
        clean,
        spliced,
    )


def _prompt(item: EncodedDocument, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[bool]]:
    """Token ids and content mask of a document up to its first user turn, and the template's call for an answer."""
    turns = item.document.turns
    until = next((i for i, turn in enumerate(turns) if turn.role == USER), len(turns) - 1) + 1
    asked = encode(make_document(turns[:until], None, item.document.source), tokenizer, len(item.ids))
    call: list[int] = []
    if tokenizer.chat_template is not None:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns[:until]]
        closed, opened = (
            str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
            for ask in (False, True)
        )
        call = tokenizer(opened.removeprefix(closed), add_special_tokens=False)["input_ids"] if opened != closed else []
    return [*asked.ids.tolist(), *call], [*asked.content.tolist(), *[False] * len(call)]


def _text(ids: Sequence[int], stop_ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> str:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))


def _training_mean(config: Config, inputs: Mapping[str, Path]) -> Float64[np.ndarray, " d"] | None:
    """Mean residual over the training rows; None where an SAE from outside comes without a store."""
    if config.train.activations == "live":
        return np.asarray(read_statistics(inputs["sae"]).mean) if "sae" in inputs else None
    store = store_of(config, inputs)
    if store is None:
        return None
    reader = StoreReader(store, "train", config.train.on_bad_chunk)
    check_holds(reader.manifest, store, model=config.backbone.model, layer=config.backbone.layer)
    return reader.mean
