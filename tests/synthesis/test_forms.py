"""Forms other than user turns: what is read, every reason why not, and what is shown reads as the same again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fac_jax.features.task import SampleShape, load_task, task_names
from fac_jax.synthesis.forms import ANSWER_WORDS, READERS, answer_misfit
from fac_jax.synthesis.prompt import load_prompt
from fac_jax.synthesis.samples import Sample, read_sample

SHAPE = SampleShape(min_turns=1, max_turns=2, min_words=3, max_words=12, label=1.0)
CHOICES = "I like tea a lot. Is tea\nbetter?\n(A) yes, as you say\n(B) it depends\nMatches: (A)"
WORSE = "eggs boil when they boil"
PAIR = f"Person: how do I boil\nan egg?\nBetter: seven minutes in boiling water\nWorse: {WORSE}"
LONGER = f"Person: hello\nAssistant: what is it?\n{PAIR}"


def read(raw: str, form: str, finish_reason: str = "stop") -> Sample:
    return read_sample(raw, finish_reason, SHAPE, form)


def test_two_choices() -> None:
    found = read(f"  {CHOICES}\r\n\n", "two choices")
    assert found.reason is None and found.mended == ()
    assert found.text == "I like tea a lot. Is tea\nbetter?\n\nChoices:\n (A) yes, as you say\n (B) it depends"
    assert found.fields == {
        "question": "I like tea a lot. Is tea\nbetter?", "choice_a": "yes, as you say", "choice_b": "it depends",
        "matches": "A",
    }  # fmt: skip
    assert read(f"```\n{CHOICES}\n```", "two choices") == Sample(
        found.text, ("took off a fence",), None, found.lines, found.fields
    )


def test_preference_pairs() -> None:
    found = read(LONGER, "preference pair")
    assert found.reason is None
    assert found.text == (
        "Human: hello\n\nAssistant: what is it?\n\nHuman: how do I boil\nan egg?\n\n"
        "Assistant: seven minutes in boiling water"
    )
    assert found.fields == {
        "prompt": [
            {"role": "user", "content": "hello"}, {"role": "assistant", "content": "what is it?"},
            {"role": "user", "content": "how do I boil\nan egg?"},
        ],
        "chosen": "seven minutes in boiling water", "rejected": "eggs boil when they boil",
    }  # fmt: skip
    assert read(PAIR.replace("Person", "User"), "preference pair").shown == PAIR, "shown with one name for a speaker"


def test_instructions() -> None:
    found = read("Write two lines\nabout tea.", "instruction and answer")
    assert found == Sample("Write two lines\nabout tea.", (), None, "Write two lines\nabout tea.", found.fields)
    assert found.fields == {"instruction": "Write two lines\nabout tea."}


NO_CHOICES = "needs a question, then (A), then (B), then which of them matches"
NO_PAIR = "needs turns of Person and Assistant, the last a Person's, then Better, then Worse"


@pytest.mark.parametrize(
    ("form", "raw", "reason"),
    [
        ("two choices", "Is tea better?", NO_CHOICES),
        ("two choices", CHOICES.replace("\nMatches: (A)", ""), NO_CHOICES),
        ("two choices", CHOICES.replace("Matches: (A)", "Matches: (C)"), NO_CHOICES),
        ("two choices", CHOICES.replace("Matches: (A)", "Matches: (A) because"), NO_CHOICES),
        ("two choices", CHOICES + "\nI hope this helps!", NO_CHOICES),
        ("two choices", CHOICES.replace("(B)", "(A)"), NO_CHOICES),
        ("two choices", CHOICES + "\n" + CHOICES, NO_CHOICES),
        ("two choices", CHOICES.replace("better?", "better"), "asks no question"),
        ("two choices", CHOICES.replace("it depends", "..."), "choice (B) has 0 words, 1 to 12 were asked for"),
        ("two choices", CHOICES.replace("it depends", "Yes! As you say."), "the choices are the same"),
        ("two choices", CHOICES.replace("I like tea a lot. Is tea\n", ""), "the question has 1 words, 3 to 12 were"),
        ("two choices", "(A) a\n(B) b\nMatches: (A)", NO_CHOICES),
        ("preference pair", "Person: why is that so?", NO_PAIR),
        ("preference pair", PAIR.replace("\nWorse", "\nBetter"), NO_PAIR),
        ("preference pair", "here it is\n" + PAIR, NO_PAIR),
        ("preference pair", PAIR.replace("Better", "Assistant: hm\nBetter"), NO_PAIR),
        ("preference pair", PAIR.replace("Person", "Assistant"), NO_PAIR),
        ("preference pair", PAIR + "\nPerson: thanks", NO_PAIR),
        ("preference pair", "Person: a\nAssistant: b\n" * 2 + PAIR, "3 questions, 1 to 2 were asked for"),
        ("preference pair", "Person: x\nAssistant:\n" + PAIR, "a turn has 0 words, 1 to 12 were asked for"),
        ("preference pair", PAIR.replace("seven minutes in boiling water", "yes"), "the better answer has 1 words"),
        ("preference pair", PAIR.replace(WORSE, "no no"), "the worse answer has 2 words"),
        (
            "preference pair", PAIR.replace("seven minutes in boiling water", "one two three four five six " * 2),
            "the answers have 12 and 5 words: their length alone would tell them apart",
        ),
        ("preference pair", PAIR.replace(WORSE, "Seven minutes. In boiling water!"), "the answers are the same"),
        ("preference pair", PAIR.replace(WORSE, "I'm sorry, I cannot help you"), "the worse answer is a refusal"),
        ("instruction and answer", "Write it", "the instruction has 2 words, 3 to 12 were asked for"),
        ("instruction and answer", "Write this <|im_end|> now", "holds marks of a chat template"),
        ("instruction and answer", " \n ", "empty"),
    ],
)  # fmt: skip
def test_what_is_none_says_why(form: str, raw: str, reason: str) -> None:
    found = read(raw, form).reason
    assert found is not None and found.startswith(reason)


@pytest.mark.parametrize("form", READERS)
def test_what_was_cut_off_is_none(form: str) -> None:
    assert read(CHOICES, form, "length").reason == "cut off before it ended"
    assert read(CHOICES, form, "content_filter").reason == "the writer ended with 'content_filter'"


words = st.lists(st.sampled_from("tea egg is it so why not 7 née".split()), min_size=3, max_size=6).map(" ".join)


@given(words, words, words, st.sampled_from("AB"))
def test_choices_that_are_shown_read_as_the_same(question: str, a: str, b: str, matches: str) -> None:
    found = read(f"{question}?\n(A) {a}\n(B) {b}\nmatches: {matches}", "two choices")
    again = read(found.shown, "two choices")
    assert again == found and found.fields["matches"] == matches
    assert (found.reason is None) == (a != b)


@given(st.lists(words, min_size=1, max_size=1) | st.lists(words, min_size=3, max_size=3), words, words)
def test_pairs_that_are_shown_read_as_the_same(turns: list[str], better: str, worse: str) -> None:
    said = [f"{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns)]
    found = read("\n".join([*said, f"BETTER: {better}", f"worse: {worse}"]), "preference pair")
    assert read(found.shown, "preference pair") == found
    assert found.fields["chosen"] == better and found.fields["rejected"] == worse
    assert (found.reason is None) == (better != worse)


def test_answers() -> None:
    assert answer_misfit("**Yes**, it is.", "stop") is None
    assert answer_misfit("Yes", "length") == "the answer was cut off"
    assert answer_misfit("Yes", "content_filter") == "the writer ended with 'content_filter'"
    assert answer_misfit(" \n", "stop") == "the answer is empty"
    assert answer_misfit("so " * (ANSWER_WORDS - 1), "stop") is None
    assert answer_misfit("so " * ANSWER_WORDS, "stop") == "the answer has 600 words, fewer than 600 were asked for"
    assert answer_misfit("I'm sorry, but no.", "stop") == "the answer is a refusal"


@pytest.mark.parametrize("name", task_names())
def test_tasks_show_samples_of_their_form(name: str) -> None:
    """Which are samples: `load_prompt` refuses others."""
    task = load_task(name)
    for prompt in (load_prompt(task, "contrast"), load_prompt(task, "cover")):
        if task.description.form == "user turns":
            assert prompt.samples == ()
            continue
        assert len(prompt.samples) >= 2
        if task.description.form == "two choices":
            matching = [text[-2] for _, text in prompt.samples]
            assert matching.count("A") == matching.count("B") == len(matching) / 2, "neither letter is the one to give"
