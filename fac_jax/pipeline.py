"""The pipeline as a table: each stage, its product, the settings it reads and the products it is made from.

    corpus -> activations -> sae -> splice, scans -> explanations, relevance -> coverage
           -> synthesis -> evaluation, selection, finetune -> report

`fac run` walks the table in order, but for what is made on request only (`sweep`, `ablate`, `diversity`); a verb makes
the rows that carry its name. What a row lists under `settings` is all that can change its product, so changing a
threshold makes coverage and what follows again, and nothing before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fac_jax.activations.harvest import harvest
from fac_jax.activations.store import read_manifest, stores_at
from fac_jax.config.data import DataSet
from fac_jax.config.features import ExplainConfig, JudgeConfig, ScanConfig
from fac_jax.config.file import Config
from fac_jax.config.llm import LlmConfig
from fac_jax.config.sae import SweepConfig
from fac_jax.corpus_files import fingerprints as corpus_fingerprints
from fac_jax.corpus_files import local_files
from fac_jax.coverage.measure import coverage, evaluate
from fac_jax.coverage.select import select
from fac_jax.diversity.measure import diversity, models, reference
from fac_jax.downstream.equal_norm import behaviour_of
from fac_jax.downstream.finetune import finetune
from fac_jax.downstream.steering import steer
from fac_jax.errors import UserError
from fac_jax.features.explain import explain, generation_features
from fac_jax.features.judge import A_SERVER, judge
from fac_jax.features.scores.prompts import shared_digest
from fac_jax.features.task import load_task
from fac_jax.plain import digest, to_plain
from fac_jax.report.page import report
from fac_jax.runs import Record, Run, Stage, fingerprint, read_record
from fac_jax.sae.formats.source import fingerprints
from fac_jax.sae.splice import splice
from fac_jax.sae.train import sweep, train
from fac_jax.scan.scan import WRITERS, scan
from fac_jax.study.rivals import PROMPTS
from fac_jax.study.study import study
from fac_jax.study.texts import write_texts
from fac_jax.synthesis.ablation import ablate
from fac_jax.synthesis.synthesize import synthesize
from fac_jax.text import file_fingerprints

WRITTEN = ("kept", "random")
"""Data sets that synthesis writes: the samples that passed, and as many chosen blindly."""


def pipeline(config: Config) -> dict[str, Stage]:
    """Every stage by name, in running order; an SAE or a store from outside replaces what makes it here, and live rows
    a store."""
    anchor, seed = f"scan:{config.coverage.anchor}", f"scan:{config.coverage.seed}"
    stages = []
    if config.scan.sae is None and _store_input(config):
        made_of = partial(_harvest_settings, config)
        stages.append(Stage("activations", "activations", "harvest", harvest, made_of, distributed=True, mends=True))
    if config.scan.sae is None:
        made_of = partial(_train_settings, config)
        stages.append(Stage("sae", "sae", "train", train, made_of, _store_input(config), distributed=True))
    if config.splice.documents and config.harvest.data in config.data:  # an SAE from outside may lack its corpus
        made = tuple(stage.name for stage in stages)  # of store and SAE, those that this run makes
        stages.append(Stage("splice", "splice", "splice", splice, partial(_splice_settings, config), made))
    stages += [
        *(scan_stage(config, name) for name in scanned(config)),
        Stage(
            *("explanations", "explanations", "explain", explain, partial(_explain_settings, config)),
            (*_sae_input(config), anchor),
        ),
        Stage("relevance", "relevance", "judge", judge, partial(_judge_settings, config), (anchor, "explanations")),
        Stage(
            *("coverage", "coverage", "coverage", coverage, partial(_coverage_settings, config)),
            (anchor, seed, "relevance", "explanations"),
        ),
        Stage(
            *("synthesis", "synthesis", "synthesize", synthesize, partial(_synthesis_settings, config)),
            (*_sae_input(config), anchor, seed, "explanations", "coverage/missing.parquet"),
        ),
        *(scan_stage(config, name) for name in WRITTEN),
        Stage(
            *("evaluation", "evaluation", "evaluate", evaluate, partial(_coverage_settings, config)),
            (anchor, seed, "scan:kept", "scan:random", "relevance"),
        ),
        Stage(
            *("selection", "selection", "select", select, partial(_selection_settings, config)),
            _selection_inputs(config),
        ),
    ]
    if (inputs := _finetune_inputs(config)) is not None:
        made_of = partial(_finetune_settings, config)
        stages.append(Stage("finetune", "finetune", "finetune", finetune, made_of, inputs))
    if config.steer.heldout is not None and load_task(config.judge.task).description.metric == "robust accuracy":
        stages.append(Stage(
            *("steering", "steering", "steer", steer, partial(_steering_settings, config)), ("synthesis",)
        ))  # fmt: skip
    if config.study.budgets:
        written_for = ("relevance", "explanations", anchor, seed, "synthesis")
        read = (anchor, seed, f"scan:{config.finetune.heldout}", "relevance")
        stages += [
            Stage(
                *("study:texts", "study/texts", "study", write_texts, partial(_study_text_settings, config)),
                (*_sae_input(config), *written_for),
            ),
            replace(scan_stage(config, "study_texts"), verb="study"),
            Stage(
                *("study", "study/cells", "study", study, partial(_study_settings, config)),
                (*read, "study:texts", "scan:study_texts"),
            ),
        ]
    if config.sweep != SweepConfig() and config.scan.sae is None:
        asked, made = partial(_sweep_settings, config), _store_input(config)
        stages.append(Stage("sweep", "sweep", "sweep", sweep, asked, made, distributed=True, on_request=True))
    if config.ablation.arms:
        name, asked = config.ablation.name, partial(_ablation_settings, config)
        inputs = (*_sae_input(config), anchor, seed, "explanations", "relevance")
        stages.append(Stage(f"ablation:{name}", f"ablations/{name}", "ablate", ablate, asked, inputs, on_request=True))
    stages += [diversity_stage(config, name) for name in (*compared(config), *WRITTEN)]
    shown = partial(_report_settings, config)
    stages.append(Stage("report", "report", "report", report, shown, tuple(stage.name for stage in stages)))
    return {stage.name: stage for stage in stages}


def report_stage(config: Config, run: Run, stages: Mapping[str, Stage]) -> Stage:
    """The report on the run directory as it is: made from what is done, and it says what is outdated."""
    whole = stages["report"]
    states = {name: run.state(stages[name], stages) for name in whole.inputs}
    done = tuple(name for name, (state, _) in states.items() if state == "done")
    outdated = {name: record.digest for name, (state, record) in states.items() if state == "outdated" and record}
    if not outdated:
        return replace(whole, inputs=done)
    made_of = partial(_report_settings, config, outdated)
    return replace(whole, inputs=done, made_of=made_of, function=partial(report, outdated=tuple(outdated)))


def check_data(config: Config) -> list[str]:
    """Names of the data sets that `fac run` reads. Raises UserError for one that the config lacks, or whose labels it
    lacks, which the run would come to only after hours: the settings say it, and no file is read."""
    named = {"harvest.data": config.harvest.data} if config.scan.sae is None and config.train.store is None else {}
    named |= {"coverage.anchor": config.coverage.anchor, "coverage.seed": config.coverage.seed}
    if _finetune_inputs(config) is not None:
        sets = ("heldout",) if trains_classifier(config) else ("train", "heldout", "outputs_for")
        named |= {f"finetune.{each}": name for each in sets if (name := getattr(config.finetune, each)) is not None}
    for setting, name in named.items():
        try:
            config.dataset(name)
        except UserError as error:
            raise UserError(f"{setting}: {error}") from None
    if config.method_of(config.judge) == "embedded" and not _labelled(config, config.coverage.anchor):
        raise UserError(
            f"judge needs labels: no source of data.{config.coverage.anchor} has any; set its label or constant_label, "
            f"or {A_SERVER}"
        )
    if config.study.budgets and not trains_classifier(config):
        raise UserError(
            f"study.budgets are set, and neither data.{config.coverage.seed} nor data.{config.coverage.anchor} has the "
            "labels of a classifier: set a label or constant_label, or leave the budgets out"
        )
    return list(dict.fromkeys([*named.values(), *scanned(config)]))


def trains_classifier(config: Config) -> bool:
    """Whether the task is measured by a classifier, and there are labels to train one. Raises UserError for a task that
    is none."""
    by_classifier = load_task(config.judge.task).description.metric == "auprc"
    return by_classifier and any(_labelled(config, name) for name in (config.coverage.seed, config.coverage.anchor))


def _labelled(config: Config, name: str) -> bool:
    """Whether a source of a data set has labels, by its settings."""
    sources = config.data[name].sources if name in config.data else ()
    return any(source.label is not None or source.constant_label is not None for source in sources)


def scanned(config: Config) -> list[str]:
    """The data sets of the config that a run scans."""
    names = [config.coverage.anchor, config.coverage.seed]
    if trains_classifier(config):
        names.append(config.finetune.heldout)
    if (picked_from := config.select.source) is not None and picked_from not in WRITTEN:
        config.dataset(picked_from)  # unknown, it would be missed as a scan that is not made
        names.append(picked_from)
    return list(dict.fromkeys(names))


def scan_stage(config: Config, name: str) -> Stage:
    """The scan of one data set; the sets that synthesis writes are read from its product."""
    inputs = (*_sae_input(config), f"{WRITERS[name]}/{name}.jsonl") if name in WRITERS else _sae_input(config)
    peaks = "all" if name in (*scanned(config), *WRITERS) else config.scan.peaks
    made_of, function = partial(_scan_settings, config, name, peaks), partial(scan, name=name, peaks=peaks)
    # Documents are picked by their peaks, so all are kept, which a command that does not pick from it has to be told.
    told = f" --select.from {name}" if name == config.select.source and config.scan.peaks != "all" else ""
    return Stage(
        f"scan:{name}", f"scans/{name}", f"scan --data {name}{told}", function, made_of, inputs, distributed=True
    )  # fmt: skip


def compared(config: Config) -> list[str]:
    """The data sets whose diversity is measured where none is named."""
    return list(dict.fromkeys((config.coverage.seed, config.coverage.anchor)))


def diversity_stage(config: Config, name: str) -> Stage:
    """The diversity of one data set; the sets that synthesis writes are read from its product."""
    inputs = (f"synthesis/{name}.jsonl",) if name in WRITTEN else ()
    made_of, measure = partial(_diversity_settings, config, name), partial(diversity, name=name)
    verb, folder = f"diversity --data {name}", f"diversity/{name}"
    return Stage(f"diversity:{name}", folder, verb, measure, made_of, inputs, on_request=True)


def _store_input(config: Config) -> tuple[str, ...]:
    return () if config.train.store or config.train.activations == "live" else ("activations",)


def _sae_input(config: Config) -> tuple[str, ...]:
    return () if config.scan.sae else ("sae",)


def _backbone(config: Config) -> dict[str, Any]:
    return {"backbone": config.backbone, "model": model_fingerprint(config.backbone.model)}


def _harvest_settings(config: Config) -> dict[str, Any]:
    data = data_fingerprint(config, config.harvest.data)
    return {"harvest": config.harvest.content, **_backbone(config), "data": data, "seed": config.run.seed}


def _train_settings(config: Config) -> dict[str, Any]:
    settings = {"sae": config.sae, "train": config.train, "seed": config.run.seed}
    outside: dict[str, Any] = {"store": external_store(config.train.store), "init": external_sae(config.train.init)}
    if config.train.activations == "live":
        harvest = config.harvest  # what decides which rows there are
        outside["live"] = {"fraction": harvest.validation_fraction, "dtype": harvest.dtype, **_backbone(config)}
        outside["data"] = data_fingerprint(config, harvest.data)
    return {**settings, "layer": config.backbone.layer, **outside}


def _sweep_settings(config: Config) -> dict[str, Any]:
    return {"sweep": config.sweep, **_train_settings(config)}


def _splice_settings(config: Config) -> dict[str, Any]:
    held_out = {"data": data_fingerprint(config, config.harvest.data), "fraction": config.harvest.validation_fraction}
    outside = {"sae": external_sae(config.scan.sae), "store": external_store(config.train.store)}
    return {"splice": config.splice, **_backbone(config), **held_out, **outside}


def _scan_settings(config: Config, name: str, peaks: str) -> dict[str, Any]:
    kept = fingerprint(Path(peaks)) if Path(peaks).is_file() else peaks
    how = replace(config.scan, peaks=kept, share=ScanConfig.share)
    settings = {"scan": how, **_backbone(config), "sae": external_sae(config.scan.sae)}
    return settings if name in WRITERS else {**settings, "data": data_fingerprint(config, name)}


def _coverage_settings(config: Config) -> dict[str, Any]:
    return {"coverage": config.coverage, "seed": config.run.seed}


def _diversity_settings(config: Config, name: str) -> dict[str, Any]:
    settings = {"diversity": config.diversity, "models": models(config), "seed": config.run.seed}
    read = dict.fromkeys([*(() if name in WRITTEN else (name,)), reference(config)])
    return {**settings, "data": {each: data_fingerprint(config, each) for each in read}}


def _writer(config: Config, asked: bool = True) -> dict[str, Any]:
    """Who answers, and the prompts it is given; no server where none is `asked`."""
    task = {"name": config.judge.task, "files": load_task(config.judge.task).digest}
    llm = config.llm if asked else LlmConfig()
    return {"url": llm.url, "model": llm.model, "task": task, "seed": config.run.seed}


def _explain_settings(config: Config) -> dict[str, Any]:
    method, written_for = config.method_of(config.explain), generation_features(config)
    explain = {"explain": replace(config.explain, method=ExplainConfig.method), "method": method}
    settings = {**explain, **_backbone(config), "sae": external_sae(config.scan.sae)}
    if written_for:  # how many of the written texts reach it is counted
        settings["threshold"] = config.coverage.threshold
    writer = _writer(config, asked=method == "llm" or written_for > 0)
    return {**settings, "writer": writer, "prompts": shared_digest()}


def _judge_settings(config: Config) -> dict[str, Any]:
    method = config.method_of(config.judge)
    judge = {"judge": replace(config.judge, method=JudgeConfig.method), "method": method}
    return {**judge, "writer": _writer(config, asked=method == "llm")}


def _synthesis_settings(config: Config) -> dict[str, Any]:
    settings = {"synthesize": config.synthesize, "threshold": config.coverage.threshold, "acts": config.scan.acts}
    return {**settings, **_backbone(config), "sae": external_sae(config.scan.sae), "writer": _writer(config)}


def _steering_settings(config: Config) -> dict[str, Any]:
    """What other runs kept counts, where they are asked for; their directories alone do not say it."""
    files = corpus_fingerprints(str(config.steer.heldout))
    steer = {name: value for name, value in to_plain(config.steer).items() if name != "equal_norm_with"}
    settings = {"steer": steer, "questions": files, **_backbone(config)}
    others = [behaviour_of(run) for run in config.steer.equal_norm_with]
    said = {one.run: {"task": one.task, "model": one.model, "kept": one.digest} for one in others}
    return {**settings, "equal_norm_with": said} if others else settings


def compares_outputs(config: Config) -> bool:
    """Whether `fac finetune` has a server compare what instruction models answer."""
    settings = config.finetune
    asked = settings.train is not None and settings.outputs_for is not None and config.llm.url is not None
    return asked and load_task(config.judge.task).description.metric == "win rate"


def _finetune_inputs(config: Config) -> tuple[str, ...] | None:
    """What `fac finetune` reads of the run; None where there is nothing to train."""
    if trains_classifier(config):
        sets = (config.coverage.anchor, config.coverage.seed, config.finetune.heldout, *WRITTEN)
        return tuple(f"scan:{name}" for name in sets)
    answers = load_task(config.judge.task).description.metric in ("preference accuracy", "win rate")
    return ("synthesis",) if answers and config.finetune.train is not None else None


def _finetune_settings(config: Config) -> dict[str, Any]:
    settings: dict[str, Any] = {"finetune": config.finetune}
    if trains_classifier(config):
        return settings if config.finetune.method == "head" else {**settings, **_backbone(config)}
    names = (config.finetune.train, config.finetune.heldout, config.finetune.outputs_for)
    read = {name: data_fingerprint(config, name) for name in dict.fromkeys(names) if name is not None}
    llm = {"url": config.llm.url, "model": config.llm.model} if compares_outputs(config) else None
    metric = load_task(config.judge.task).description.metric
    return {**settings, **_backbone(config), "data": read, "metric": metric, "judge": llm, "seed": config.run.seed}


def _ablation_settings(config: Config) -> dict[str, Any]:
    files = {arm.samples for arm in config.ablation.arms.values() if arm.samples is not None}
    read = {name: fingerprint(Path(name)) for name in sorted(files) if Path(name).is_file()}
    return {"ablation": config.ablation, "samples": read, "coverage": config.coverage, **_synthesis_settings(config)}


def _study_text_settings(config: Config) -> dict[str, Any]:
    study = config.study  # what follows from seeds and adapters is drawn and trained later, from the same texts
    written = {"budget": max(study.budgets), "arms": study.arms, "pools": study.pools, "prompts": PROMPTS}
    return {**written, **_synthesis_settings(config)}


def _study_settings(config: Config) -> dict[str, Any]:
    data = {each: data_fingerprint(config, each) for each in (config.coverage.anchor, config.coverage.seed)}
    settings = {"study": config.study, "finetune": config.finetune, "threshold": config.coverage.threshold}
    diverse = {"diversity": config.diversity, "models": models(config)}
    return {**settings, **diverse, "data": data, "seed": config.run.seed, **_backbone(config)}


def _selection_settings(config: Config) -> dict[str, Any]:
    settings = {"threshold": config.coverage.threshold, "select": config.select}
    return {**settings, "seed": config.run.seed} if config.select.method == "random" else settings


def _selection_inputs(config: Config) -> tuple[str, ...]:
    features = {"missing": ("coverage/missing.parquet",), "relevant": ("relevance",), "all": ()}
    return (f"scan:{config.select.source or config.coverage.anchor}", *features[config.select.target])


def _report_settings(config: Config, outdated: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Ablations of whatever config are shown, so all that the run directory holds count; so do outdated products."""
    folders = sorted((Path(config.run.dir) / "ablations").glob("*"))
    settings = {"ablations": {one.name: record.digest for one in folders if (record := read_record(one))}}
    return {**settings, "outdated": outdated} if outdated else settings


def data_fingerprint(config: Config, name: str) -> dict[str, Any]:
    """A data set's settings and the fingerprints of its files."""
    dataset: DataSet = config.dataset(name)
    settings = to_plain(dataset)
    if not dataset.without:  # products from before there was such a setting stay what they are
        del settings["without"]
    return {"name": name, "settings": settings, "files": file_fingerprints(dataset)}


def model_fingerprint(source: str) -> str | list[str]:
    """Fingerprints of a local model's files; a hub id stands for itself."""
    if source.startswith("pkg://") or Path(source).is_file():
        return [fingerprint(file) for file in local_files(source)]
    if Path(source).is_dir():
        return [f"{file.name}:{fingerprint(file)}" for file in sorted(Path(source).iterdir()) if file.is_file()]
    return source


def external_store(place: str | None) -> list[str] | None:
    """What a store from outside the run says of itself: one digest for each of its layers."""
    if place is None:
        return None
    manifests = [to_plain(read_manifest(store)) for store in stores_at(place)]
    # SAEs of stores from before there was such a field stay what they are.
    return [digest({k: v for k, v in one.items() if v or k != "files_digest"}) for one in manifests]


def external_sae(source: str | None) -> list[str] | None:
    """Fingerprints of an SAE from outside the run; one on the hub is downloaded for it, as every stage needs it."""
    return None if source is None else fingerprints(source)


def run_stages(run: Run, stages: Mapping[str, Stage], wanted: list[str]) -> list[tuple[Stage, Record]]:
    """Make the wanted stages in order; what is done already is only read."""
    return [(stages[name], run.execute(stages[name], stages)) for name in wanted]
