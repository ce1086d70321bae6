"""What fills the gap, as sections of the page: kept samples, the classifier trained with them, existing documents."""

from __future__ import annotations

from collections.abc import Sequence

from fac_jax.report.blocks import Section, absent, entry, facts, meter, more, numbers, span, table, texts, veil
from fac_jax.report.figures import Interval, interval_figure, number
from fac_jax.report.markup import Html, join, tag
from fac_jax.report.products import Kept, Row, RunView
from fac_jax.report.verdict import ARMS, compare, nothing_to_write_for, percent

OPEN = 20
"""Samples shown at once."""
MOST = 300
"""Samples or documents on the page at most, the later ones folded away; the products hold all."""
SMALL = 500
"""A held-out set below this size is said to be small."""

PROOF = (
    "Every generation is measured on every missing feature, whichever it was written for, and kept only when the "
    "autoencoder finds one of them above the threshold (the tick on the bar). The marked token is where the "
    "activation peaks."
)
NOTHING_KEPT = "No generation passed the filter: none activates a missing feature above the threshold."


def kept(view: RunView) -> Section:
    """The kept samples, each with the activation that it was kept for."""
    short = "Samples"
    if view.synthesis is None:
        return Section("kept", short, "Kept samples", absent("A set of synthetic samples", "fac synthesize CONFIG"))
    if not view.kept:
        why = NOTHING_KEPT if view.missing else nothing_to_write_for(view)
        return Section("kept", short, "Kept samples", join(tag("p", why), _funnel(view.synthesis)))
    most = max(sample.peak for sample in view.kept)
    entries = [_sample(sample, view.threshold, most, view.harmful) for sample in view.kept[:MOST]]
    left = len(view.kept) - len(entries)
    body = join(
        tag("p", PROOF),
        _funnel(view.synthesis),
        more(entries, OPEN, "samples"),
        tag("p", f"{left:,} more are in ", tag("code", "synthesis/samples.parquet"), ".") if left else None,
    )
    return Section("kept", short, f"{len(view.kept):,} kept samples", body)


def _funnel(synthesis: Row) -> Html:
    """What was written and what became of it, step by step."""
    steps = (
        ("1, from explanations", synthesis["step1"], synthesis["target_hit_rate_one_step"]),
        ("2, from contrastive pairs", synthesis["step2"], synthesis["target_hit_rate"]),
    )
    rows = [
        [
            name,
            "; ".join(f"{count:,} × {reason}" for reason, count in step["rejected"].items()) or "none",
            f"{step['written']:,}",
            f"{step['valid']:,}",
            f"{step['hit_by_their_own']:,}",
            percent(hit),
        ]
        for name, step, hit in steps
    ]
    caption = (
        f"{synthesis['written_for']:,} of {synthesis['missing']:,} missing features were written for; "
        f"{synthesis['pairs']:,} of these gave a contrastive pair"
    )
    if exhausted := synthesis.get("exhausted"):  # older products do not say
        caption += f", {exhausted:,} no candidate that activates them"
    columns = numbers("Written", "Valid", "Features hit by their own", "Missing features hit so far")
    return table([*texts("Step", "Rejected"), *columns], rows, caption)


def _sample(sample: Kept, threshold: float, most: float, harmful: bool) -> Html:
    side = facts(
        f"step {sample.step}",
        f"written for {sample.written_for}" if sample.written_for != sample.feature else None,
        f"also covers {_few(sample.covers, 6)}" if sample.covers else None,
    )
    before, token, after = _marked(sample)
    words = tag("blockquote", span(before, token, after) if token else veil(before), class_="quote")
    shown = veil(sample.about) if harmful else sample.about
    about = tag("p", tag("span", "the feature: ", class_="quiet"), shown) if sample.about else None
    proof = tag("div", meter(sample.peak, threshold, most), about, class_="proof")
    return entry(f"For feature {sample.feature}", side, words, proof)


def _marked(sample: Kept) -> tuple[str, str, str]:
    """The sample's text before, at and after its activating token; all of it before when the place is not known."""
    if sample.span is not None:
        start = sample.text.find(sample.span.before + sample.span.token + sample.span.after)
        if start >= 0:
            at = start + len(sample.span.before)
            return sample.text[:at], sample.span.token, sample.text[at + len(sample.span.token) :]
    return sample.text, "", ""


def _few(features: Sequence[int], shown: int) -> str:
    return ", ".join(map(str, features[:shown])) + (" …" if len(features) > shown else "")


def classifier(view: RunView) -> Section:
    """The downstream check: does training with the kept samples rank held-out documents better?"""
    title, short = "Does it help a classifier?", "Classifier"
    if (metric := view.summary("relevance").get("metric", "auprc")) != "auprc":
        verb = "fac steer, with steer.heldout," if metric == "robust accuracy" else "fac finetune, with finetune.train,"
        said = f"Samples of this task are for what is measured by {metric}: {verb} does that."
        return Section("classifier", short, title, tag("p", said, class_="absent"))
    if view.finetune is None:
        return Section("classifier", short, title, absent("A classifier", "fac finetune CONFIG"))
    base, seeds = view.finetune["heldout"]["base_rate"], view.finetune["head"]["seeds"]
    caption = (
        f"Mean ± standard deviation over training seeds {', '.join(map(str, seeds))}; a random scorer has AUPRC "
        f"{base:.3f} and AUROC 0.5"
    )
    columns = numbers("Documents", "Positive", "AUPRC", "AUROC", "AUPRC of each seed")
    body = join(
        tag("p", _finding(view.finetune), class_="finding"),
        tag("p", _setting(view.finetune)),
        tag("div", _intervals(view.finetune), class_="figures"),
        table([*texts("Trained on"), *columns], [_arm(arm, view.finetune["arms"][arm]) for arm in ARMS], caption),
    )
    return Section("classifier", short, title, body)


def _finding(finetune: Row) -> str:
    """What the table says, claimed only as far as the intervals allow."""
    pairs = (("seed+kept", "seed"), ("seed+kept", "seed+random"), ("seed+random", "seed"))
    sentences = [f"{found}." for arm, other in pairs if (found := compare(finetune, arm, other))]
    if finetune["arms"]["seed+kept"]["added"] == 0:
        sentences.append("No sample was kept, so seed+kept is the seed set itself.")
    base = finetune["heldout"]["base_rate"]
    chance = [arm for arm in ARMS if "auprc" in (row := finetune["arms"][arm]) and row["auprc"]["mean"] <= base]
    if chance:
        sentences.append(f"No better than a random scorer ({base:.3f}): {', '.join(chance)}.")
    if finetune["heldout"]["documents"] < SMALL:
        sentences.append(
            f"With {finetune['heldout']['documents']} held-out documents, only large differences can show."
        )
    return " ".join(sentences)


def _setting(finetune: Row) -> str:
    heldout, head = finetune["heldout"], finetune["head"]
    frozen = "" if head.get("method") == "lora" else "frozen "  # older products do not say: theirs were
    return (
        f"A linear head on {frozen}features ({head['features']}): {head['epochs']} epochs of Adam at "
        f"{number(head['learning_rate'])}, batch {head['batch']}; {head['imbalance']}. Held out: "
        f"{heldout['documents']:,} documents, {heldout['positive']:,} positive, in no training arm; scored once, "
        "after the last step. The arm “anchor” is trained on every labelled anchor document: what real data would "
        "have given."
    )


def _intervals(finetune: Row) -> Html:
    rows = [
        Interval(arm, row["auprc"]["mean"], row["auprc"]["sd"], row["auprc"]["values"], colour)
        for colour, arm in enumerate(ARMS)
        if "auprc" in (row := finetune["arms"][arm])
    ]
    x_label = f"mean (point), ± 1 sd (bar), {len(finetune['head']['seeds'])} seeds (ticks)"
    return interval_figure("Held-out AUPRC", rows, finetune["heldout"]["base_rate"], "random scorer", x_label)


def _arm(name: str, row: Row) -> list[str]:
    counts = [f"{row['documents']:,}", f"{row['positive']:,}"]
    if "auprc" not in row:
        return [name, *counts, f"not trained: {row['not_trained']}", "–", "–"]
    means = [f"{row[metric]['mean']:.3f} ± {row[metric]['sd']:.3f}" for metric in ("auprc", "auroc")]
    return [name, *counts, *means, " ".join(f"{value:.3f}" for value in row["auprc"]["values"])]


_SOUGHT = {"missing": "missing features", "relevant": "relevant features", "all": "features of the SAE"}
_CHOSEN = {
    "greedy": "Chosen greedily, the most new features first.",
    "magnitude": "Chosen greedily by the height of their peaks, each relative to the feature's highest.",
    "greed_select": "Chosen by SAE-GreedSelect, which looks at every feature.",
    "sim_scale": "Chosen by SAE-SimScale, which leaves out what resembles the documents taken before.",
    "random": "Chosen at random, as a control.",
}


def selection(view: RunView) -> Section:
    """Existing documents that would cover what is missing."""
    title, short = "Existing documents that cover what is missing", "Selection"
    if view.selection is None:
        return Section("selection", short, title, absent("A selection", "fac select CONFIG"))
    found = view.summary("selection")
    source, method = found.get("source", "anchor"), found.get("method", "greedy")
    total, sought = found.get("features", len(view.missing)), _SOUGHT[found.get("target", "missing")]
    if not view.selection:
        why = f"none of them activates one of the {total:,} {sought}" if total else "nothing is missing"
        return Section("selection", short, title, tag("p", f"No {source} document is taken: {why}."))
    covered = view.selection[-1]["covered"]
    entries = [
        entry(
            f"{row['rank'] + 1}. adds {len(row['features'])}",
            facts(f"{row['covered']:,} of {total:,} covered", f"features {_few(row['features'], 4)}"),
            tag("div", veil(_shorten(row["text"])), class_="small"),
        )
        for row in view.selection[:MOST]
    ]
    summary = (
        f"Where real data may be taken instead of generated: {len(view.selection):,} {source} documents together "
        f"activate {covered:,} of the {total:,} {sought}. {_CHOSEN[method]}"
    )
    return Section("selection", short, title, join(tag("p", summary), more(entries, 5, "documents")))


def _shorten(words: str, limit: int = 400) -> str:
    return words if len(words) <= limit else words[:limit].rsplit(" ", 1)[0] + " …"
