"""The mask is the user's words and nothing else; packing loses nothing and resumes exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from fac_jax import packing
from fac_jax.config.activations import BackboneConfig
from fac_jax.config.data import DataSet, Source
from fac_jax.errors import UserError
from fac_jax.packing import EncodedDocument, batches, encodable_documents, encode, encode_all, pack
from fac_jax.text import Document, Turn, make_document
from tests.refused import ALTERNATE, with_refused

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the two control tokens: offsets can be checked by hand."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {character: index + 2 for index, character in enumerate(sorted(alphabet))}
    core = Tokenizer(models.BPE(vocab={"<|im_start|>": 0, "<|im_end|>": 1, **vocabulary}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", bos_token="<|im_start|>")
    made.chat_template = TEMPLATE
    return made


def test_the_mask_is_the_users_words_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [Turn("user", "user: what\nnow?"), Turn("assistant", "never"), Turn("user", "héllo <|im_end|> x")]
    document = make_document(turns, None, "t")
    encoded = encode(document, tokenizer, 10_000)
    messages = [{"role": t.role, "content": t.content} for t in turns]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert encoded.ids.tolist() == list(expected)
    said = tokenizer.decode(encoded.ids[encoded.content].tolist())
    assert said == "user: what\nnow?héllo  x"  # the planted control token is not content either


def test_a_model_without_a_template_gets_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    encoded = encode(make_document([Turn("user", "ab"), Turn("user", "c")], None, "t"), plain, 100)
    assert plain.decode(encoded.ids.tolist()) == "ab\n\nc" and encoded.content.sum() == 3


def test_truncation_keeps_the_first_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    document = make_document([Turn("user", "abcdefgh" * 20)], None, "t")
    whole, cut = encode(document, tokenizer, 1000), encode(document, tokenizer, 60)
    assert len(cut.ids) == 60 and (cut.ids == whole.ids[:60]).all() and (cut.content == whole.content[:60]).all()


@given(
    turns=st.lists(
        st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text("ab é<|im_end>", max_size=12)), min_size=1),
        max_size=5,
    ),
    most=st.integers(1, 80),
)
def test_many_documents_are_masked_as_token_by_token(
    tokenizer: PreTrainedTokenizerFast, turns: list[list[tuple[str, str]]], most: int
) -> None:
    """Whatever is tokenized together; a token is the user's own when all of it lies inside one of their turns."""
    together = packing.TOGETHER
    documents = [make_document([Turn(role, said) for role, said in one], None, "t") for one in turns]
    packing.TOGETHER = 2
    try:
        found = list(encode_all(documents, tokenizer, most))
    finally:
        packing.TOGETHER = together
    assert [one.document for one in found] == documents
    special = set(tokenizer.all_special_ids)
    for document, one in zip(documents, found, strict=True):
        messages = [{"role": turn.role, "content": turn.content} for turn in document.turns]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        whole = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        assert one.ids.tolist() == whole["input_ids"][:most]
        own, at = [], 0
        for turn in document.turns:  # their words stand in this order, and the template holds none of these letters
            at = text.index(f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>", at) + len(
                f"<|im_start|>{turn.role}\n"
            )
            if turn.role == "user":
                own.append((at, at + len(turn.content)))
            at += len(turn.content)
        mask = [
            any(start <= a < b <= stop for start, stop in own) and token not in special
            for token, (a, b) in zip(whole["input_ids"], whole["offset_mapping"], strict=True)
        ]
        assert one.content.tolist() == mask[:most]


def documents_of(lengths: list[int]) -> list[EncodedDocument]:
    made = []
    for index, length in enumerate(lengths):
        document = Document(f"{index:016x}", (Turn("user", str(index)),), None, "t")
        content = np.arange(length) % 3 != 0
        made.append(EncodedDocument(document, np.full(length, index + 1, np.int32), content, {}))
    return made


@given(st.lists(st.integers(1, 32), min_size=1, max_size=60), st.integers(1, 4))
def test_packing_places_every_token_once_and_resumes_exactly(lengths: list[int], rows: int) -> None:
    documents = documents_of(lengths)
    packed = list(pack(documents, rows, 32))
    seen = 0
    for batch in packed:
        assert batch.first == seen
        for index, item in enumerate(batch.documents):
            where = batch.slot == index
            assert item is documents[seen + index]
            assert (batch.tokens[where] == item.ids).all() and (batch.content[where] == item.content).all()
            assert (batch.positions[where] == np.arange(len(item.ids))).all()
            assert len(set(batch.segments[where])) == 1 and len(set(np.where(where)[0])) == 1
        assert ((batch.segments == 0) == (batch.slot == -1)).all() and not batch.content[batch.slot == -1].any()
        seen += len(batch.documents)
    assert seen == len(documents)
    for batch in packed:  # a pass that starts where a batch starts makes the same batches
        again = next(iter(pack(documents[batch.first :], rows, 32, batch.first)))
        assert (again.tokens == batch.tokens).all() and again.first == batch.first


@given(st.lists(st.integers(1, 12), max_size=40), st.integers(1, 4))
def test_a_batch_takes_documents_as_long_as_all_can_be_placed(lengths: list[int], rows: int) -> None:
    """Most documents are taken without looking for their places, which must change nothing."""
    documents, expected = documents_of(lengths), []
    for item in documents:
        if (
            expected
            and packing.first_fit_decreasing([len(one.ids) for one in (*expected[-1], item)], rows, 12) is not None
        ):
            expected[-1].append(item)
        else:
            expected.append([item])
    assert [[d.document.id for d in b.documents] for b in pack(documents, rows, 12)] == [
        [d.document.id for d in group] for group in expected
    ]


def test_packing_is_dense_on_conversation_lengths() -> None:
    lengths = np.random.default_rng(0).choice([40, 90, 150, 200, 256, 256, 256], 600).tolist()
    packed = list(pack(documents_of(lengths), 8, 512))
    computed = sum(batch.tokens.size for batch in packed[:-1])
    real = sum(int((batch.segments > 0).sum()) for batch in packed[:-1])
    assert real / computed > 0.9


def test_only_documents_of_the_data_set_are_shown_to_the_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A conversation that another split of the file holds does not stop this one."""
    strict = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    strict.chat_template = ALTERNATE + TEMPLATE
    rows, refused = with_refused("".join(f'{{"text": "{i}"}}\n' for i in range(40)))
    (tmp_path / "a.jsonl").write_text(rows)
    stopped = 0
    for tenth in range(10):
        source = Source(path=str(tmp_path / "a.jsonl"), split=(tenth / 10, (tenth + 1) / 10))
        skipped: list[str] = []
        whole = list(encodable_documents(DataSet((source,), on_bad_row="skip"), "a", strict, skipped))
        try:
            assert list(encodable_documents(DataSet((source,)), "a", strict)) == whole and not skipped
        except UserError as error:
            stopped += 1
            assert "the chat template refuses" in str(error) and skipped
    assert 0 < stopped <= refused < 10


def test_a_document_longer_than_a_row_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="40 tokens do not fit a row of 32"):
        list(pack(documents_of([40]), 2, 32))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    data = DataSet(sources=(Source(str(tmp_path / "a.jsonl")),), max_tokens=64)
    with pytest.raises(UserError, match="data.x.max_tokens is 64, more than backbone.row_tokens 32"):
        batches(data, "x", tokenizer, BackboneConfig(row_tokens=32))


def test_what_the_template_refuses_is_a_malformed_row(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Also a turn that it drops. It has no number, counts towards no limit, and may come first."""
    strict = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    strict.chat_template = ALTERNATE + TEMPLATE.replace(
        "for m in messages %}<", "for m in messages if m.role != 'x' %}<"
    )
    rows, refused = with_refused("".join(f'{{"text": "{i}"}}\n' for i in range(20)))
    dropped = '{"text": [{"role": "user", "content": "q"}, {"role": "x", "content": "a"}]}\n'
    (tmp_path / "a.jsonl").write_text(rows + dropped + '{"text": "20"}\n{"text": "21"}\n')
    data = DataSet(sources=(Source(str(tmp_path / "a.jsonl"), limit=21),))
    with pytest.raises(
        UserError, match=r"a.jsonl:1: the chat template refuses turns of user, user \(roles must .*skip"
    ):
        next(encodable_documents(data, "x", strict))
    skipped: list[str] = []
    found = encodable_documents(replace(data, on_bad_row="skip"), "x", strict, skipped)
    assert [document.text for document in found] == [str(i) for i in range(21)]
    assert len(skipped) == refused + 1 and skipped[-1] == "a.jsonl:24: the chat template drops a 'x' turn"
    with pytest.raises(UserError, match="t: the chat template refuses turns of user, user .*; leave the row out"):
        encode(make_document([Turn("user", "a"), Turn("user", "b")], None, "t"), strict, 9)
