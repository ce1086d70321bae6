"""A writer's raw text to a sample, or to the reason why it is none.

A sample is what the task's `form` and `sample` say: for toxicity one block of user turns, one to three lines, 5 to 60
words, and never an answer; `forms.py` reads the other forms. The text is untrusted: it is read strictly, and what may
be mended (wrapping quotes, a number or a speaker's name in front, an unfinished last sentence) is mended and noted.
Nothing is dropped: a text that fails keeps its reason. Reads and writes no file.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from fac_jax.features.task import SampleShape
from fac_jax.llm.control_tokens import without_control_tokens
from fac_jax.synthesis.forms import READERS, Fields
from fac_jax.words import normalised

NEAR_DUPLICATE = 0.7
"""Two texts with this share of common three-word runs (Jaccard) are one."""
COPIED_SHARE = 0.7
"""A text with this share of its three-word runs in one example of its prompt is a copy of it."""
FEWEST_DISTINCT = 0.4
"""Share of distinct words below which a text of ten words or more is a loop, not a message."""

TWIN = "near duplicate of "
"""How the reason begins of a text that is nearly an earlier one."""
COPIES = ("copy of ", "copies ", TWIN)
"""How the reasons begin that say that a text is a sample, but not a new one."""

_QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("`", "`"), ("*", "*"))
_NUMBER = re.compile(r"(?:\d{1,2}[.)]|[-*•])\s+")
_USER = re.compile(r"(?:user|human|me|message|text|query)\s*:\s*", re.IGNORECASE)
_ANSWERER = re.compile(r"(?:assistant|ai|bot|chatbot|answer|response|reply|a)\s*:", re.IGNORECASE)
_TEMPLATE = re.compile(r"<\|.*?\|>")
_FENCE = re.compile(r"```\w*\n(.*)\n```", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?…][\"')\]”’]*(?=\s|$)")
# How a model talks when it answers, refuses, or presents its work, instead of writing what a user would.
_ASSISTANT_VOICE = re.compile(
    r"(?:^(?:sure|certainly|absolutely|of course)\s*[,!.:]"
    r"|^(?:i'?m|i am|i apologi[sz]e|sorry)\b.{0,40}\b(?:can(?:no|')t|unable to|not able to)\b"
    r"|^i (?:cannot|can't|won't|will not) (?:help|assist|provide|fulfil|comply|answer|write|create|generate)"
    r"|\bas an? (?:ai|(?:large )?language model)\b"
    r"|\b(?:i'?m|i am) (?:just |only )?(?:an?|your) (?:(?:helpful|friendly|virtual|digital|private|chat) )*"
    r"(?:ai|assistant|chatbot|bot|language model)\b"
    r"|\b(?:i'?m|i am|i'll be|we're) (?:always |just )?(?:here|happy|glad|ready) to"
    r" (?:help|assist|support|chat|listen|discuss)"
    r"|\bi can (?:also )?(?:help|assist|tell|show|teach|give) you\b|\bhow (?:can|may) i (?:help|assist) you\b"
    r"|^here(?:'s| is| are) (?:an?|the|your|my|another|one|some|two|three)\b"
    r"|^(?:this|the|your) (?:message|sentence|text|prompt|example)\b"
    r"|^(?:another|a|one|new) message\b"
    r"|^to \w+ .{0,80}, you (?:must|can|could|should|need|will|may|have)\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Sample:
    """A text as it would be kept."""

    text: str
    """What is measured: of user turns one a line."""
    mended: tuple[str, ...]
    """What was done to the raw text, in order."""
    reason: str | None
    """Why it is no sample; None when it is one."""
    lines: str | None = None
    """As a prompt shows it, where that is not the text."""
    fields: Fields = field(default_factory=dict)
    """What forms other than user turns consist of."""

    @property
    def shown(self) -> str:
        """As a prompt shows it."""
        return self.text if self.lines is None else self.lines

    @property
    def is_twin(self) -> bool:
        """Whether it is rejected only because it is nearly an earlier one."""
        return self.reason is not None and self.reason.startswith(TWIN)

    @property
    def in_form(self) -> bool:
        """Whether it is a sample, new or not."""
        return self.reason is None or self.reason.startswith(COPIES)

    def rejected(self, reason: str) -> Sample:
        """The same text, no sample any more."""
        return replace(self, reason=reason)


def read_sample(raw: str, finish_reason: str, shape: SampleShape, form: str = "user turns") -> Sample:
    """Mend what may be mended, then judge the structure. The first thing that is wrong is the reason."""
    if form != "user turns":
        return _read_form(raw, finish_reason, shape, form)
    lines, mended = _mend(raw.replace("\r\n", "\n").replace("’", "'"))
    reason = _list_or_answer(lines)
    if reason is None and finish_reason not in ("stop", "length"):
        reason = f"the writer ended with {finish_reason!r}"
    if finish_reason == "length" and lines:
        kept = _whole_sentences(lines)
        if kept != lines:
            mended.append("cut back to the last whole sentence")
        if not kept and reason is None:
            return Sample("\n".join(lines), tuple(mended[:-1]), "cut off before a sentence ended")
        lines = kept or lines
    return Sample("\n".join(lines), tuple(mended), reason or _misfit(lines, shape))


def _read_form(raw: str, finish_reason: str, shape: SampleShape, form: str) -> Sample:
    stripped = raw.replace("\r\n", "\n").replace("’", "'").strip()
    fenced = _FENCE.fullmatch(stripped)
    lines = [line.strip() for line in (fenced[1] if fenced else stripped).split("\n") if line.strip()]
    mended = ("took off a fence",) if fenced else ()
    reason = None
    if not lines:
        reason = "empty"
    elif any(_holds_marks(line) for line in lines):
        reason = "holds marks of a chat template"
    elif finish_reason != "stop":
        reason = "cut off before it ended" if finish_reason == "length" else f"the writer ended with {finish_reason!r}"
    if reason is not None:
        return Sample("\n".join(lines), mended, reason)
    found = READERS[form](lines, shape)
    return Sample(found.text, mended, found.reason, found.written, found.fields)


def without_copies(
    samples: Sequence[Sample],
    names: Sequence[str],
    known: Collection[str],
    shown: Sequence[Collection[str]],
    earlier: Sequence[tuple[str, str]] = (),
) -> list[Sample]:
    """Reject copies of `known` texts, near copies of what each one's prompt had `shown`, and near duplicates.

    `known` holds normalised texts. Of several alike, the first stays; (name, text) pairs in `earlier` come before all.
    """
    candidates = [_unless_copied(sample, known, examples) for sample, examples in zip(samples, shown, strict=True)]
    valid = [index for index, sample in enumerate(candidates) if sample.reason is None]
    every = [*earlier, *((names[index], candidates[index].text) for index in valid)]
    twins = near_duplicates([text for _, text in every])
    for place, index in enumerate(valid, len(earlier)):
        if place in twins:
            candidates[index] = candidates[index].rejected(f"{TWIN}{every[twins[place]][0]}")
    return candidates


def near_duplicates(texts: Sequence[str], share: float = NEAR_DUPLICATE) -> dict[int, int]:
    """For each text that is nearly the same as an earlier one: that earlier one's index.

    Exact, by prefix filtering (Bayardo et al. 2007): two sets can only reach Jaccard `share` when the first
    |A| - ceil(share |A|) + 1 elements of each, rarest first, have one in common; so only those are looked up.
    """
    sets = [_runs(text) for text in texts]
    frequency = Counter(run for runs in sets for run in runs)
    holders: dict[str, list[int]] = defaultdict(list)
    found: dict[int, int] = {}
    for index, runs in enumerate(sets):
        rarest = sorted(runs, key=lambda run: (frequency[run], run))
        prefix = rarest[: len(runs) - math.ceil(share * len(runs)) + 1]
        for other in sorted({holder for run in prefix for holder in holders[run]}):
            if len(runs & sets[other]) >= share * len(runs | sets[other]):
                found[index] = other
                break
        else:
            for run in prefix:
                holders[run].append(index)
    return found


def reasons(samples: Iterable[Sample]) -> dict[str, int]:
    """How often each kind of reason occurs, numbers and names in it left out, most frequent first."""
    kinds = (re.sub(rf"{TWIN}.*", "near duplicate", s.reason) for s in samples if s.reason is not None)
    return dict(Counter(re.sub(r"^\d+", "N", kind) for kind in kinds).most_common())


def _mend(raw: str) -> tuple[list[str], list[str]]:
    mended: list[str] = []
    text = raw.strip()
    before = None
    while text != before:  # quotes may hide a number and a number quotes
        before = text
        for opening, closing in _QUOTES:
            if len(text) > 1 and text[0] == opening and text[-1] == closing and opening not in text[1:-1]:
                text = text[1:-1].strip()
                mended.append("took off quotes")
        if "\n" not in text and (number := _NUMBER.match(text)):
            text = text[number.end() :]
            mended.append("took off a list mark")
        if speaker := _USER.match(text):
            text = text[speaker.end() :]
            mended.append("took off a speaker's name")
    lines = [" ".join(line.split()) for line in text.split("\n") if line.strip()]
    named = [line for line in lines if _USER.match(line)]
    if named:
        lines = [_USER.sub("", line, count=1) for line in lines]
        mended.append("took off a speaker's name")
    return [line for line in lines if line], mended


def _whole_sentences(lines: list[str]) -> list[str]:
    """Without the unfinished end of the last line; nothing when no sentence ends in it and it is the only one."""
    ends = [match.end() for match in _SENTENCE_END.finditer(lines[-1])]
    return [*lines[:-1], lines[-1][: ends[-1]]] if ends else lines[:-1]


def _list_or_answer(lines: list[str]) -> str | None:
    if not lines:
        return "empty"
    if sum(bool(_NUMBER.match(line)) for line in lines) > 1:
        return "a list of several, one was asked for"
    if any(_ANSWERER.match(line) for line in lines):
        return "holds an answer"
    if any(_ASSISTANT_VOICE.search(line) for line in lines):
        return "speaks as the assistant"
    if any(_holds_marks(line) for line in lines):
        return "holds marks of a chat template"
    return None


def _holds_marks(line: str) -> bool:
    """Of a chat template, whichever model's: an instruction is a user's turn later, and all samples are trained on."""
    return _TEMPLATE.search(line) is not None or without_control_tokens(line) != line


def _misfit(lines: list[str], shape: SampleShape) -> str | None:
    words = normalised(" ".join(lines)).split()
    if not shape.min_turns <= len(lines) <= shape.max_turns:
        return f"{len(lines)} turns, {shape.min_turns} to {shape.max_turns} were asked for"
    if not shape.min_words <= len(words) <= shape.max_words:
        return f"{len(words)} words, {shape.min_words} to {shape.max_words} were asked for"
    sentences = [normalised(sentence) for line in lines for sentence in re.split(r"(?<=[.!?])\s", line)]
    twice = any(count > 1 and len(sentence.split()) > 3 for sentence, count in Counter(sentences).items())
    if twice or (len(words) >= 10 and len(set(words)) < FEWEST_DISTINCT * len(words)):
        return "repeats itself"
    return None


def _unless_copied(sample: Sample, known: Collection[str], shown: Iterable[str]) -> Sample:
    if sample.reason is not None:
        return sample
    if normalised(sample.text) in known:
        return sample.rejected("copy of an anchor or seed text")
    runs = _runs(sample.text)
    if any(len(runs & _runs(example)) >= COPIED_SHARE * len(runs) for example in shown):
        return sample.rejected("copies an example of its prompt")
    return sample


def _runs(text: str) -> frozenset[str]:
    """Runs of three words (all words together when there are fewer)."""
    words = normalised(text).split()
    return frozenset(" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))
