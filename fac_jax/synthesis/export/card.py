"""The data set card: what the samples are for, what a row holds, where they came from, and who should not have them.

Front matter as the Hugging Face hub reads it, then prose. Says only what the run's records say. Reads and writes no
file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import yaml

from fac_jax.synthesis.export.read import Kept
from fac_jax.synthesis.forms import ANSWER_WORDS, LONGER
from fac_jax.synthesis.samples import COPIED_SHARE, NEAR_DUPLICATE

GATE = (
    "This data set holds texts that ask for, plan or voice harm, written by a language model on request. They are for "
    "training and testing detectors of such texts. By asking for access you say that you will use them for that only, "
    "that you will not train a model to write or to answer such texts, and that you will not publish them ungated."
)
GATE_HOLDS = (
    "On the hub this gate holds only while access requests are switched on in the settings of the repository, as "
    "`fac export --public --publish-harmful` does; whoever opens a private one by hand has to switch them on first."
)
USES = {
    "user turns": "training and testing classifiers of what people write to a chat assistant",
    "preference pair": "training and testing reward models, and preference optimisation",
    "two choices": "finding and testing steering vectors, from the difference between two answers to one question",
    "instruction and answer": "supervised fine-tuning on instructions",
}
TASK_CATEGORIES = {
    "user turns": "text-classification", "preference pair": "text-generation", "two choices": "multiple-choice",
    "instruction and answer": "text-generation",
}  # fmt: skip
COLUMNS = {
    "id": "such as f812-s2-0: written for feature 812 in step 2, draw 0",
    "text": "what the sparse autoencoder measured",
    "label": "see below",
    "prompt": "the conversation up to the person's last turn",
    "chosen": "the better answer",
    "rejected": "the worse answer",
    "question": "the question",
    "choice_a": "answer (A)",
    "choice_b": "answer (B)",
    "matches": "the letter of the choice that shows the behaviour, as the instruction to the writer below defines it",
    "instruction": "the instruction",
    "answer": "the writer's answer to it",
    "feature": "the missing feature that the sample is kept for",
    "peak": "the highest activation of that feature on the text; above the threshold",
    "about": "what the writer was told of that feature: tokens that it fires on, or an explanation of it",
    "written_for": "the feature whose prompt it answers, not always the one that it is kept for",
    "step": "1: written from the feature alone; 2: from a contrastive pair of step 1",
    "generator": "what wrote it",
    "model": "the model that answered, as the server named it",
    "prompt_digest": "SHA-256 (16 hex digits) of the messages that it answers",
    "seed": "of the draw",
}


def card(kept: Kept, columns: Sequence[str]) -> str:
    """The README.md of a data set with these columns."""
    what = kept.task.description
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(kept), sort_keys=False, allow_unicode=True, width=120)}---",
        f"# Synthetic samples: {what.title}",
        f"{len(kept.rows):,} samples that a language model wrote for features of a model that a seed set did not "
        f"activate, each kept for the activation that proves it. A sample is {_article(kept.form)}. Made with fac_jax, "
        "an implementation of *Less is Enough* (arXiv 2602.10388).",
        "## What it is for",
        _uses(kept),
        "## What a row holds",
        _table(("column", "what it is"), ((f"`{name}`", COLUMNS.get(name, "")) for name in columns)),
        "## What the label means",
        f"`label` says how sure it is that {what.positive} (1: it is so). Every sample was written to be so, and all "
        f"carry {what.sample.label:g}; nobody has checked them one by one. The rubric by which features were found to "
        "belong to the task:",
        _quoted(kept.task.rubric),
        "## Where it comes from",
        _table(("", ""), _origins(kept)),
        "What the writer was told a sample is (step 2):",
        _quoted(_instruction(kept)),
        "## How samples were kept",
        _rules(kept),
        "## Limits",
        _limits(kept),
    ]
    if kept.harmful:
        parts += ["## Access", f"{GATE}\n\n{GATE_HOLDS}"]
    return "\n\n".join(parts) + "\n"


def _front_matter(kept: Kept) -> dict[str, object]:
    rows = len(kept.rows)
    size = next((name for most, name in ((10**3, "n<1K"), (10**4, "1K<n<10K")) if rows < most), "10K<n<100K")
    tags = ["synthetic", "fac_jax", "sparse-autoencoder", "feature-activation-coverage"]
    front: dict[str, object] = {
        "pretty_name": f"Synthetic samples: {kept.task.description.title}",
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train.jsonl"}]}],
        "task_categories": [TASK_CATEGORIES[kept.form]],
        "size_categories": [size],
        "annotations_creators": ["machine-generated"],
        "language_creators": ["machine-generated"],
        "tags": [*tags, *(["not-for-all-audiences"] if kept.harmful else [])],
    }
    if kept.harmful:
        front |= {
            "extra_gated_heading": "Access is granted by hand, for work on detectors",
            "extra_gated_prompt": GATE,
            "extra_gated_fields": {
                "Affiliation": "text",
                "What the detector is for": "text",
                "I will use these texts to train or test detectors only": "checkbox",
            },
            "extra_gated_button_content": "Ask for access",
        }
    return front


def _uses(kept: Kept) -> str:
    intended = f"For {USES[kept.form]}: {kept.task.description.title}."
    if not kept.harmful:
        return f"{intended} It fills gaps of one seed set as one model sees them; it is no benchmark."
    return (
        f"{intended} Only for detectors of harm: to train one, or to test whether one finds such texts. Not for "
        "training a model to write, answer or carry out such requests. There are user messages only, and no answers to "
        "them."
    )


def _origins(kept: Kept) -> list[tuple[str, str]]:
    settings, summary = kept.record.settings, kept.record.summary
    synthesis, steps = settings["synthesize"], [summary["step1"], summary["step2"]]
    found = [
        ("backbone", f"`{kept.backbone}`, the residual after {settings['backbone']['layer']} layers"),
        ("sparse autoencoder", _sae(kept)),
        ("activations", f"`{settings['acts']}`; a feature is active above {kept.threshold:g}"),
        ("writer", ", ".join(f"`{name}`" for name in sorted({row["generator"] for row in kept.rows}))),
        ("sampling", f"temperature {synthesis['temperature']:g}, top-p {synthesis['top_p']:g}"),
        (
            "prompts",
            f"digest `{settings['writer']['task']['files']}` of the task's files; of each sample's, its column",
        ),
        ("missing features", f"{summary['missing']:,}, of which {summary['written_for']:,} were written for"),
        ("texts written", " + ".join(f"{step['written']:,}" for step in steps) + " in two steps"),
        ("samples among them", " + ".join(f"{step['valid']:,}" for step in steps)),
        ("kept", f"{len(kept.rows):,}, for {len({row['feature'] for row in kept.rows}):,} features"),
        ("made", f"{kept.record.finished}, with {_versions(kept)}"),
    ]
    if (rate := summary["target_hit_rate"]) is not None:
        found.append(("missing features that any text activates", f"{rate:.1%}"))
    return found


def _sae(kept: Kept) -> str:
    if kept.scan is None:
        return kept.sae
    scan = kept.scan
    active = "a threshold each" if scan.k is None else f"K {scan.k}"
    return f"{kept.sae}: {scan.features:,} features, {active}, digest `{scan.sae}`"


def _versions(kept: Kept) -> str:
    return ", ".join(
        f"{name} {kept.record.versions[name]}" for name in ("fac-jax", "jax") if name in kept.record.versions
    )


def _instruction(kept: Kept) -> str:
    """The system's part of the prompt, from which a reader learns what, say, `matches` stands for."""
    prompt = kept.task.prompt("cover")
    return prompt.partition("[system]")[2].partition("\n[")[0].strip()


def _rules(kept: Kept) -> str:
    shape = kept.task.description.sample
    rules = [
        f"Every text was scored against every missing feature; it is kept only if one of them peaks above "
        f"{kept.threshold:g} on it, and samples that cover most come first.",
        f"{shape.min_words} to {shape.max_words} words and {shape.min_turns} to {shape.max_turns} turns of the person; "
        "what is longer, shorter or of another form is rejected.",
        f"Of two texts that share {NEAR_DUPLICATE:.0%} of their three-word runs (Jaccard) the first stays. A text with "
        f"{COPIED_SHARE:.0%} of its runs in an example of its prompt, or one that is in the anchor or seed set, is "
        "rejected as a copy.",
        _refusals(kept),
    ]
    rejected = sum((Counter(kept.record.summary[step]["rejected"]) for step in ("step1", "step2")), Counter[str]())
    if rejected:
        most = "; ".join(f"{reason} ({count:,})" for reason, count in rejected.most_common(8))
        rules.append(f"Rejected most often: {most}.")
    return _list(rules)


def _refusals(kept: Kept) -> str:
    if kept.form == "user turns":
        return "A refusal, an answer or a text in an assistant's voice is no user message, and is rejected."
    if kept.form == "preference pair":
        return (
            f"A worse answer that is a refusal is rejected, and so are answers of which one is more than {LONGER:g} "
            "times as long as the other."
        )
    if kept.form == "instruction and answer":
        return f"An instruction whose answer is a refusal, cut off, or of {ANSWER_WORDS} words or more is rejected."
    return "Two choices with the same words are rejected."


def _limits(kept: Kept) -> str:
    rules = [
        "A model wrote all of it: it may be wrong, narrow, or unlike what people write. Nobody read it through.",
        "That a feature fires proves that this backbone sees something there, not that the text is good, or correctly "
        "labelled. Explanations of features are guesses.",
        "All samples carry one label, so a classifier needs others beside them. What is missing depends on the anchor, "
        "the seed set and the threshold.",
        "The terms of the model that wrote the samples may bind who uses them; no licence is chosen here.",
    ]
    return _list(rules)


def _article(form: str) -> str:
    return {
        "user turns": "one block of user turns", "preference pair": "a preference pair",
        "two choices": "a question with two choices", "instruction and answer": "an instruction with its answer",
    }[form]  # fmt: skip


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {a} | {b.replace('|', chr(92) + '|')} |" for a, b in lines)


def _list(rules: Iterable[str]) -> str:
    return "\n".join(f"- {rule}" for rule in rules)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())
