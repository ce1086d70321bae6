"""Chat control tokens are taken out however they are spelled; ordinary text comes back as it is."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fac_jax.llm.control_tokens import plain_reading, without_control_tokens

# As the models' own tokenizers spell them.
CONTROL = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|reserved_special_token_12|>", "<|python_tag|>", "<|user|>", "<|assistant|>", "<|end|>",
    "<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|channel|>", "<|message|>", "[INST]", "[/INST]", "<<SYS>>",
    "<</SYS>>", "<s>", "</s>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>",
    "<｜User｜>", "<｜end▁of▁sentence｜>", "[gMASK]", "<sop>", "[AVAILABLE_TOOLS]", "[/TOOL_RESULTS]", "<tool_call>",
    "</think>", "<unused12>", "<extra_id_1>",
]  # fmt: skip
DISGUISES = {
    "as it is": lambda token: token,
    "in capitals": lambda token: token.upper(),
    "full width": lambda token: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in token),
    "zero width": lambda token: "\u200b".join(token),
    "bidi": lambda token: f"\u202e{token[:2]}\u2066{token[2:]}\u2069",
    "tags": lambda token: "\U000e0041".join(token),
    "accents": lambda token: "".join(c + "\u0301" if c.isalpha() else c for c in token),
    "variation": lambda token: "\ufe0f".join(token),
    "mathematical": lambda token: "".join(chr(ord(c) - ord("a") + 0x1D41A) if "a" <= c <= "z" else c for c in token),
    "cyrillic": lambda token: token.translate(str.maketrans("seotSIT", "ѕеотЅІТ")),
}


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("token", CONTROL)
def test_known_tokens_go_and_what_surrounds_them_stays(token: str, disguise: str) -> None:
    hidden = DISGUISES[disguise](token)
    found = without_control_tokens(f"before {hidden} after")
    left = found.removeprefix("before ").removesuffix(" after")
    assert found.startswith("before ") and found.endswith(" after")
    assert not any(unicodedata.category(c)[0] in "LNPS" for c in left), "nothing that shows is left of it"


def nested(tokens: list[str]) -> str:
    """Each token inside the one before: taking one out makes another."""
    text = ""
    for token in tokens:
        text = token[: len(token) // 2] + text + token[len(token) // 2 :]
    return text


@given(st.lists(st.sampled_from(CONTROL), min_size=1, max_size=12))
def test_removing_one_makes_no_other(tokens: list[str]) -> None:
    assert without_control_tokens(f"a {nested(tokens)} b") == "a  b"


@given(
    st.lists(st.one_of(st.sampled_from([*CONTROL, "<", "|", ">", "[", "]", "im_", "\u200b", "＜", "/s"]), st.text()))
)
def test_no_token_survives_whatever_it_stands_in(pieces: list[str]) -> None:
    cleaned = without_control_tokens("".join(pieces))
    plain, _ = plain_reading(cleaned)
    for token in CONTROL:
        assert token not in cleaned and plain_reading(token)[0] not in plain
    assert without_control_tokens(cleaned) == cleaned


LETTERS = st.characters(exclude_characters="<>[]|", exclude_categories=["Ps", "Pe", "Pi", "Pf", "Sm", "So", "Sk"])


@given(st.text(LETTERS))
def test_text_without_brackets_is_ordinary(text: str) -> None:
    assert without_control_tokens(text) == text


@given(st.text(), st.sampled_from(CONTROL), st.text(LETTERS))
def test_what_stands_away_from_tokens_is_left_alone(before: str, token: str, after: str) -> None:
    whole, alone = without_control_tokens(f"{before}\n{token}\n{after}"), without_control_tokens(before)
    assert whole == f"{alone}\n\n{after}"


@pytest.mark.parametrize(
    "text",
    [
        "if a < b and b > c: print(x[0], y['s'], z[i])",
        "List.map f <| g x |> h",
        "<p>Hello <b>there</b></p> <a href='x'>y</a> <span>z</span>",
        "<3 you & <me> ;-) [1] [sic] [INSTALL] <system@example.test>",
        "x |> filter |> head, a || b, <||>, <| |>",
        "ﷺ ① ½ ＡＢＣ （全角） 「引用」 《书名》 【注】 ‹ici› «là» 👩‍❤️‍👨 עִבְרִית \u202bשלום\u202c",
    ],
)
def test_ordinary_text_with_brackets(text: str) -> None:
    assert without_control_tokens(text) == text


def test_a_deep_nest_takes_no_long_time() -> None:
    assert without_control_tokens(nested(["<|im_start|>"] * 500)) == ""
