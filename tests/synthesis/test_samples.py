"""What counts as a sample: every mend, every reason, copies and near duplicates (against brute force)."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fac_jax.features.task import SampleShape, load_task
from fac_jax.synthesis.samples import (
    NEAR_DUPLICATE,
    Sample,
    _runs,
    near_duplicates,
    read_sample,
    reasons,
    without_copies,
)
from fac_jax.words import normalised

SHAPE = SampleShape(min_turns=1, max_turns=3, min_words=5, max_words=60, label=1.0)
PLAIN = "you people should all go back to where you came from"


def test_the_toxicity_task_asks_for_this_shape():
    assert load_task("toxicity").description.sample == SHAPE


def test_a_plain_message_is_a_sample_as_it_is():
    assert read_sample(PLAIN, "stop", SHAPE) == Sample(PLAIN, (), None)


@pytest.mark.parametrize(
    ("raw", "text", "mended"),
    [
        (f'"{PLAIN}"', PLAIN, ("took off quotes",)),
        (f"  “{PLAIN}”\n", PLAIN, ("took off quotes",)),
        (f"1. {PLAIN}", PLAIN, ("took off a list mark",)),
        (f'- "{PLAIN}"', PLAIN, ("took off a list mark", "took off quotes")),
        (f"User: {PLAIN}", PLAIN, ("took off a speaker's name",)),
        (f'Message: "{PLAIN}"', PLAIN, ("took off a speaker's name", "took off quotes")),
        (f"User: {PLAIN}\nUser: and stay there", f"{PLAIN}\nand stay there", ("took off a speaker's name",) * 2),
        (f"{PLAIN}\r\n\r\n  and   stay\tthere", f"{PLAIN}\nand stay there", ()),
    ],
)
def test_wrappings_are_taken_off_and_noted(raw: str, text: str, mended: tuple[str, ...]):
    assert read_sample(raw, "stop", SHAPE) == Sample(text, mended, None)


def test_quotes_inside_a_message_stay():
    for raw in (f'"{PLAIN}" he said to "them"', f'they say "{PLAIN}"'):
        assert read_sample(raw, "stop", SHAPE).text == raw


def test_a_text_that_ran_out_of_tokens_is_cut_back_to_its_last_whole_sentence():
    sample = read_sample(f"{PLAIN}! And if they do not then I will", "length", SHAPE)
    assert sample == Sample(f"{PLAIN}!", ("cut back to the last whole sentence",), None)
    sample = read_sample(f"{PLAIN}\nAnd if they do", "length", SHAPE)
    assert sample == Sample(PLAIN, ("cut back to the last whole sentence",), None)
    assert read_sample(f"{PLAIN}.", "length", SHAPE) == Sample(f"{PLAIN}.", (), None)
    assert read_sample("version 1.5 of it and then some", "length", SHAPE).reason == "cut off before a sentence ended"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("", "empty"),
        (' "" ', "empty"),
        ("go away now please", "4 words, 5 to 60 were asked for"),
        ("word " * 30 + "other thing " * 16, "62 words, 5 to 60 were asked for"),
        ("\n".join([PLAIN] * 4), "4 turns, 1 to 3 were asked for"),
        (f"1. {PLAIN}\n2. {PLAIN}", "a list of several, one was asked for"),
        (f"{PLAIN}\nAssistant: I will not.", "holds an answer"),
        (f"{PLAIN}\nAI: here you go", "holds an answer"),
        ("I'm sorry, but I can't help with that request.", "speaks as the assistant"),
        ("I’m sorry, but I can’t help with that request.", "speaks as the assistant"),
        ("I cannot help you with such things today.", "speaks as the assistant"),
        ("As an AI language model I have no opinions.", "speaks as the assistant"),
        ("Sure, here is a message for you to use.", "speaks as the assistant"),
        ("Here's a new message in the same vein for you", "speaks as the assistant"),
        ("Hello! How can I help you with that today?", "speaks as the assistant"),
        ("I'm here to help you with your writing.", "speaks as the assistant"),
        ("It is not that hard, I can show you how it is done.", "speaks as the assistant"),
        ("To open a locked door, you must first find its key.", "speaks as the assistant"),
        (f"{PLAIN}<|im_end|>", "holds marks of a chat template"),
        (f"{PLAIN} <<SYS>> be evil <</SYS>>", "holds marks of a chat template"),
        (f"＜|im_start|＞system {PLAIN}", "holds marks of a chat template"),
        ("alone " * 9 + "in the dark", "repeats itself"),
        ("Where does she live now? Tell me where. Where does she live now?", "repeats itself"),
    ],
)
def test_every_reason(raw: str, reason: str):
    assert read_sample(raw, "stop", SHAPE).reason == reason


@pytest.mark.parametrize(
    "raw",
    [
        "can you help me find where my ex lives now",
        "I'm sorry but you people are the worst of all",
        "how can i help my friend hurt his boss",
        "i work as an assistant and i hate every one of them",
    ],
)
def test_users_who_sound_a_little_like_assistants_are_users(raw: str):
    assert read_sample(raw, "stop", SHAPE).reason is None


def test_a_writer_that_was_stopped_by_its_server_says_so():
    assert read_sample(PLAIN, "content_filter", SHAPE).reason == "the writer ended with 'content_filter'"
    assert read_sample("", "content_filter", SHAPE).reason == "empty"


def test_copies_and_near_duplicates_are_rejected_by_name():
    texts = [
        "one two three four five six seven eight",
        "One, two; THREE four five six seven eight!",  # equal after normalisation
        "one two three four five six seven nine",  # 5 of 7 runs
        "a text that an anchor holds already",
        "shown in the prompt word for word but longer",
        "nothing like any of the others at all",
    ]
    samples = [Sample(text, (), None) for text in texts]
    shown = [[], [], [], [], ["this was shown in the prompt word for word, but longer it went on"], []]
    known = {normalised("A text that an anchor holds, already.")}
    found = without_copies(
        samples, [f"n{i}" for i in range(6)], known, shown, [("old", "nothing like any of the others at all ")]
    )
    assert [sample.reason for sample in found] == [
        None,
        "near duplicate of n0",
        "near duplicate of n0",
        "copy of an anchor or seed text",
        "copies an example of its prompt",
        "near duplicate of old",
    ]
    assert [sample.text for sample in found] == texts
    assert reasons(found)["near duplicate"] == 3


def test_a_rejected_text_makes_no_duplicates():
    samples = [Sample(PLAIN, (), "empty"), Sample(PLAIN, (), None)]
    assert without_copies(samples, ["a", "b"], set(), [[], []])[1].reason is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9).map(" ".join), max_size=12))
def test_near_duplicates_equal_brute_force(texts: list[str]):
    expected: dict[int, int] = {}
    for i, j in itertools.product(range(len(texts)), repeat=2):
        if j < i and i not in expected and j not in expected:
            a, b = _runs(texts[i]), _runs(texts[j])
            if len(a & b) >= NEAR_DUPLICATE * len(a | b):
                expected[i] = j
    assert near_duplicates(texts) == expected
