"""What training with the samples did to a reward model or to an instruction model: a section for each."""

from __future__ import annotations

from fac_jax.report.blocks import Section, numbers, table, texts
from fac_jax.report.figures import Interval, interval_figure, number
from fac_jax.report.markup import Html, join, tag
from fac_jax.report.products import Row, RunView

REWARD = (
    "A reward is trained to score the better of two answers higher; accuracy is the share of held-out pairs where it "
    "does, and a tie is not a win. No prompt of a held-out pair is in an arm, in any spelling."
)
INSTRUCTION = (
    "Adapters learn the answers to instructions. Held-out answers were in no arm: the fewer nats a token, the less "
    "surprised the model is by them. That says little of how well it answers: AlpacaEval's win rates (WR, LC) need its "
    "own judge, which reads model_outputs.json of each arm."
)
JUDGE = (
    "A local pairwise judge, which is not AlpacaEval: {judge} compared the arms' answers to {count:,} instructions in "
    "both orders. Preferred counts a tie as half; where the two orders disagree, or the answers are equal, it is a tie."
)


def tuned(view: RunView) -> list[Section]:
    """The section of what the task has trained; none for a classifier."""
    if view.reward is not None:
        return [Section("reward", "Reward", "Does it help a reward model?", _reward(view.reward))]
    if view.completions is not None:
        body = _completions(view.completions)
        return [Section("instructions", "Instructions", "Does it help an instruction model?", body)]
    return []


def _reward(found: Row) -> Html:
    heldout, arms = found["heldout"], found["arms"]
    sections = list(next(iter(arms.values()))["sections"])
    rows = [
        [
            name, f"{row['pairs']:,}", _percent(row["accuracy"]), _interval(row["interval"], 100, " %"),
            " ".join(map(str, row["ties"])), *(_percent(row["sections"][one]) for one in sections),
            *([_percent(row["score"])] if sections else []),
        ]
        for name, row in arms.items()
    ]  # fmt: skip
    columns = numbers("Pairs", "Accuracy", "95% interval", "Ties by seed", *sections, *(["Mean"] if sections else []))
    points = [
        Interval(name, row["accuracy"]["mean"], row["accuracy"]["sd"], row["accuracy"]["values"], colour)
        for colour, (name, row) in enumerate(arms.items())
    ]
    x_label = f"mean (point), ± 1 sd (bar), {len(found['training']['seeds'])} seeds (ticks)"
    figure = interval_figure("Held-out accuracy", points, 0.5, "coin", x_label)
    caption = f"{heldout['pairs']:,} held-out pairs; mean ± sd over seeds; intervals by bootstrap over pairs"
    return join(
        tag("p", _differences(found, "accuracy", 100, " points"), class_="finding"),
        tag("p", f"{REWARD} {_setting(found)}"),
        tag("div", [figure], class_="figures"),
        table([*texts("Trained on"), *columns], rows, caption),
        tag("p", _subsets(heldout), class_="quiet small"),
    )


def _subsets(heldout: Row) -> str | None:
    """Which of RewardBench was there."""
    if not heldout["subsets"]:
        return None
    notes = [
        f"{label}: {', '.join(heldout[name])}." if heldout[name] else ""
        for label, name in (
            ("Subsets of RewardBench that are not there", "missing_subsets"),
            ("Subsets that RewardBench has not, which count in accuracy only", "unknown_subsets"),
        )
    ]
    if heldout["without_subset"]:
        notes.append(f"{heldout['without_subset']:,} pairs name no subset.")
    return " ".join(note for note in ("Sections weigh their subsets by their published sizes.", *notes) if note)


def _completions(found: Row) -> Html:
    heldout = found["heldout"]
    rows = [
        [
            name, f"{row['instructions']:,}" if "instructions" in row else "untrained",
            f"{row['nats_per_token']['mean']:.3f} ± {row['nats_per_token']['sd']:.3f}",
            _interval(row["interval"], 1, ""),
        ]
        for name, row in found["arms"].items()
    ]  # fmt: skip
    caption = (
        f"{heldout['instructions']:,} held-out answers, {heldout['tokens']:,} tokens; mean ± sd over seeds; intervals "
        "by bootstrap over answers"
    )
    judged = found["local_pairwise_judge"]
    return join(
        tag("p", _differences(found, "nats a token", 1, ""), class_="finding"),
        tag("p", f"{INSTRUCTION} {_setting(found)}"),
        table(
            [*texts("Trained on"), *numbers("Instructions", "Nats a token", "95% interval")], rows, caption
        ),
        _judged(judged, found["outputs"]["instructions"]) if judged else None,
    )  # fmt: skip


def _judged(judged: list[Row], count: int) -> Html:
    names = ("win", "loss", "tie", "disagreed", "equal", "failed")
    rows = [
        [
            f"{one['arm']} against {one['other']}", *(f"{one[name]:,}" for name in names),
            "–" if one["preferred"] is None else f"{one['preferred']:.1%}",
        ]
        for one in judged
    ]  # fmt: skip
    columns = numbers("Wins", "Losses", "Ties", "Orders disagree", "Equal", "Unreadable", "Preferred")
    said = tag("p", JUDGE.format(judge=judged[0]["judge"], count=count))
    return join(said, table([*texts("Local pairwise judge"), *columns], rows, "Answers compared by a local judge"))


def _differences(found: Row, what: str, times: float, unit: str) -> str:
    """Each difference between arms with its interval, which says whether it can be told from 0."""
    sentences = []
    for one in found["differences"]:
        apart = one["low"] > 0 or one["high"] < 0
        said = f"{one['arm']} less {one['minus']}: {times * one['mean']:+.3g}{unit} of {what}"
        interval = f"95% interval {times * one['low']:+.3g} to {times * one['high']:+.3g}"
        sentences.append(f"{said} ({interval}{'' if apart else ', which holds 0'}).".replace("-", "−"))
    return " ".join(sentences)


def _setting(found: Row) -> str:
    how = found["training"]
    lora = how["lora"]
    trained = (
        "A linear head on frozen features"
        if lora is None
        else f"Adapters of rank {lora['rank']}, alpha {lora['alpha']:g}"
    )
    return (
        f"{trained}: {how['epochs']} epochs at {number(how['learning_rate'])}, batch {how['batch']}, seeds "
        f"{', '.join(map(str, how['seeds']))}. Held out: {found['heldout']['data']}."
    )


def _percent(spread: Row) -> str:
    return f"{spread['mean']:.1%} ± {100 * spread['sd']:.1f}"


def _interval(estimate: Row, times: float, unit: str) -> str:
    return f"{times * estimate['low']:.3g} to {times * estimate['high']:.3g}{unit}"
