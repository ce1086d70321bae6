"""Pooled residuals against a mean taken by hand, document by document."""

from typing import Any

import numpy as np
import pytest

from fac_jax.config import BackboneConfig
from fac_jax.downstream.pool import pooled_residuals
from fac_jax.errors import UserError
from fac_jax.text import Turn, make_document

GEOMETRY = BackboneConfig(layer=3, rows_per_batch=2, row_tokens=16)


def test_mean_over_the_users_words_only(toy: Any) -> None:
    texts = ["good dog", "the cat is very bad", "a", "kind kind vile", "was the dog calm", "cruel cat"] * 4
    documents = [make_document([Turn("user", text)], None, str(i)) for i, text in enumerate(texts)]
    found = pooled_residuals(documents, toy, GEOMETRY, 16, "test")
    np.testing.assert_allclose(found, [toy.mean(text, 3) for text in texts], atol=1e-5)


def test_a_document_without_content_is_named(toy: Any) -> None:
    """Cut after one token, only the template's prefix is left."""
    documents = [make_document([Turn("user", "good dog")], None, "file.jsonl:7")]
    with pytest.raises(UserError, match=r"file\.jsonl:7\) has no content token within its first 1 tokens"):
        pooled_residuals(documents, toy, GEOMETRY, 1, "test")
