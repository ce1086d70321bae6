"""What each verb does with a config, once that is read: stages made, what they measured printed.

What a stage needs is imported inside the functions, so that help and config errors come without loading jax.
"""

from __future__ import annotations

import json
import sys
import typing
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fac_jax.cli.options import EXPORT
from fac_jax.config.checks import check_output
from fac_jax.config.file import Config
from fac_jax.distributed import is_first
from fac_jax.errors import UserError
from fac_jax.plain import suggest, to_plain
from fac_jax.runs import Record, Run, Stage, write_text


def run(config: Config, verb: str, options: dict[str, str]) -> None:
    """All stages in order, then the summary."""
    from fac_jax.downstream.classifier import check_held_out
    from fac_jax.pipeline import check_data, pipeline, run_stages, trains_classifier

    check_data(config)
    stages = pipeline(config)
    if "dry-run" in options:
        _dry_run(config, list(stages))
        return
    with Run(config) as run:
        if trains_classifier(config) and run.state(stages["finetune"], stages)[0] != "done":
            check_held_out(config)
        wanted = [name for name, stage in stages.items() if not stage.on_request]
        run_stages(run, stages, [name for name in wanted if name != "report"])
        _write_report(run, stages, options)


def report(config: Config, verb: str, options: dict[str, str]) -> None:
    """The report on whatever is there."""
    from fac_jax.pipeline import pipeline
    from fac_jax.report.products import read_records

    if not read_records(Path(config.run.dir)):
        raise UserError(
            f"run.dir {config.run.dir} holds no finished stage to report on: name another --run.dir, or make them with "
            "`fac run CONFIG`"
        )
    with Run(config) as run:
        _write_report(run, pipeline(config), options)


def _write_report(run: Run, stages: dict[str, Stage], options: dict[str, str]) -> None:
    """The page, which names the commands for stages that are not done; the findings, and where the page is."""
    from fac_jax.pipeline import report_stage, run_stages
    from fac_jax.report.terminal import summary

    ((_, record),) = run_stages(run, stages | {"report": report_stage(run.config, run, stages)}, ["report"])
    Console().print(summary(run.dir, record.summary.get("outdated", ()), unsafe="show-unsafe" in options))
    print(f"report: {(run.dir / 'report' / 'index.html').resolve()}")


def stage(config: Config, verb: str, options: dict[str, str]) -> None:
    """The stages that carry the verb's name."""
    from fac_jax.features.task import load_task
    from fac_jax.pipeline import pipeline, run_stages, scan_stage, scanned

    stages = pipeline(config)
    wanted = [name for name, stage in stages.items() if stage.verb == verb]
    if verb == "scan":
        names = [options["data"]] if "data" in options else scanned(config)
        stages.update({f"scan:{name}": scan_stage(config, name) for name in names if f"scan:{name}" not in stages})
        wanted = [f"scan:{name}" for name in names]
    if not wanted:
        if verb == "splice":
            raise UserError(
                f"fac splice has nothing to measure: splice.documents is {config.splice.documents}, and harvest.data "
                f"{config.harvest.data!r} must be one of the data sets ({', '.join(config.data) or 'none'})"
            )
        if verb == "sweep" and config.scan.sae is None:
            raise UserError(
                "fac sweep has nothing to train: say --sweep.k, --sweep.features, --sweep.variants, --sweep.layers or "
                "--sweep.seeds"
            )
        if verb == "study":
            raise UserError(
                "fac study has nothing to compare: say --study.budgets 25 50 100 200, or take "
                "configs/science_toxicity.yaml"
            )
        if verb == "finetune" and load_task(config.judge.task).description.metric == "auprc":
            raise UserError(
                "fac finetune has nothing to train a classifier on: give sources of coverage.seed a label or a "
                "constant_label"
            )
        if verb == "finetune":
            raise UserError(
                f"fac finetune has nothing to train for task {config.judge.task!r}: set finetune.train and "
                "finetune.heldout to data sets of preference pairs (configs/tasks/helpfulness.yaml) or of instructions "
                "with answers (configs/tasks/instruction_following.yaml); `fac steer` is for samples with two choices"
            )
        if verb == "steer":
            raise UserError(
                f"fac steer needs samples with two choices (task {config.judge.task!r} may have others) and questions "
                "to measure on: set steer.heldout to a file of them, or take configs/tasks/sycophancy.yaml"
            )
        if verb == "harvest" and config.train.activations == "live":
            raise UserError(
                "fac harvest has nothing to make: train.activations is live, so training computes its rows itself; set "
                "it to store to keep them"
            )
        raise UserError(f"fac {verb} has nothing to make: train.store or scan.sae names a product from elsewhere")
    if "dry-run" in options:
        _dry_run(config, wanted)
        return
    with Run(config) as run:
        made = run_stages(run, stages, wanted)
        for stage, record in made if is_first() else ():
            _say_made(run, stage, record)
            for key, value in record.summary.items():
                print(f"  {key}: {value:,}" if isinstance(value, (int, float)) else f"  {key}: {value}")


def _say_made(run: Run, stage: Stage, record: Record) -> None:
    print(f"{stage.name}: {run.folder(stage)}  ({record.seconds:.1f} s, {record.finished})")


def diversity(config: Config, verb: str, options: dict[str, str]) -> None:
    """The metrics of each data set, then a table of them all."""
    from fac_jax.diversity.table import read_product, table
    from fac_jax.pipeline import compared, diversity_stage, pipeline, run_stages

    stages = pipeline(config)
    wanted = {
        stage.name: stage
        for name in ([options["data"]] if "data" in options else compared(config))
        for stage in [diversity_stage(config, name)]
    }
    with Run(config) as run:
        made = run_stages(run, stages | wanted, list(wanted))
        for stage, record in made:
            _say_made(run, stage, record)
        shown = table([read_product(run.folder(stage)) for stage, _ in made])
    Console(width=None if sys.stdout.isatty() else 160).print(shown)


def ablate(config: Config, verb: str, options: dict[str, str]) -> None:
    """The arms, then a table of them."""
    from fac_jax.pipeline import pipeline, run_stages
    from fac_jax.synthesis.ablation import table

    stages = pipeline(config)
    wanted = [name for name, stage in stages.items() if stage.verb == verb]
    if not wanted:
        raise UserError(
            "fac ablate has no arms to compare: CONFIG names none under ablation.arms (configs/ablations has some)"
        )
    with Run(config) as run:
        for stage, record in run_stages(run, stages, wanted):
            _say_made(run, stage, record)
            shown = table(json.loads((run.folder(stage) / "ablation.json").read_text(encoding="utf-8")))
    Console(width=None if sys.stdout.isatty() else 200).print(shown)


def _dry_run(config: Config, wanted: list[str]) -> None:
    """What the stages would ask of the server, and what it would cost."""
    from fac_jax.dry_run import estimates, table

    Console(width=None if sys.stdout.isatty() else 120).print(table(config, estimates(config, wanted)))


def samples(config: Config, verb: str, options: dict[str, str]) -> None:
    """What synthesis kept, or the story of one sample."""
    from fac_jax.report.samples import listing, printed, read_story

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    run_dir, unsafe = Path(config.run.dir), "show-unsafe" in options
    if options["action"] == "list":
        console.print(listing(run_dir, config, unsafe))
        return
    if "out" in options:
        check_output("--out", options["out"])
    story, harmful = read_story(run_dir, config, options["sample"])
    console.print(printed(story, harmful and not unsafe))
    if "out" in options:
        write_text(Path(options["out"]), json.dumps(to_plain(story), indent=1))
        print(f"written: {options['out']}")


def export(config: Config, verb: str, options: dict[str, str]) -> None:
    """The kept samples as another program's files."""
    from fac_jax.synthesis.export.export import Hub, export

    for needed in ("format", "to"):
        if needed not in options:
            raise UserError(f"fac export needs --{needed} {EXPORT[needed]}")
    if "push" not in options and (
        asked := next((flag for flag in ("public", "publish-harmful") if flag in options), "")
    ):
        raise UserError(f"--{asked} says who may see what --push OWNER/NAME uploads, and there is no --push")
    hub = Hub(options["push"], "public" in options, "publish-harmful" in options) if "push" in options else None
    done = export(config, options["format"], Path(options["to"]), options.get("name"), hub)
    print(f"written: {done.folder} ({done.samples:,} samples): {', '.join(done.files)}")
    if done.address is not None:
        print(f"pushed: {done.address} ({'public' if 'public' in options else 'private'})")


def status(config: Config, verb: str, options: dict[str, str]) -> None:
    """A line for each stage, its product named from the run directory; then what has changed, and what to call."""
    from fac_jax.cli.changes import changes
    from fac_jax.pipeline import pipeline, report_stage

    stages, run = pipeline(config), Run(config)
    stages["report"] = report_stage(config, run, stages)
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "state", "made", "seconds"):
        table.add_column(name, justify="right" if name == "seconds" else "left", no_wrap=True)
    table.add_column("product")  # gives way where the terminal is narrow
    changed, waiting, on_request = list[str](), list[Stage](), list[Stage]()
    for stage in stages.values():
        state, record = run.state(stage, stages)
        if record and state == "outdated":
            of_products = "it was made of other products than are there now"
            why = of_products if stage.name == "report" else changes(run, stage, record, stages)
            changed.append(f"{stage.name}: {why}")
        if state != "done":
            (on_request if stage.on_request else waiting).append(stage)
        shown = "on request" if state == "absent" and stage.on_request else state
        made, seconds = (record.finished, f"{record.seconds:.1f}") if record else ("", "")
        table.add_row(stage.name, shown, made, seconds, Text(stage.folder, no_wrap=True, overflow="ellipsis"))
    print(f"run directory: {run.dir}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for line in changed:
        print(line)
    if waiting:
        print(f"next: {waiting[0].command} (fac run CONFIG makes all but what is on request)")
    if on_request:
        commands = dict.fromkeys(f"fac {stage.verb.split()[0]} CONFIG" for stage in on_request)
        print(f"on request: {', '.join(commands)}")


def convert(config: Config, verb: str, options: dict[str, str]) -> None:
    """Write an SAE in another form, or the backbone as a Hugging Face directory: for servers that read no GGUF, or with
    an adapter merged into it."""
    if "to" not in options:
        raise UserError("fac convert needs --to FOLDER, the folder to write")
    if "sae" in options:
        if "adapter" in options:
            raise UserError("--adapter is for the backbone, --sae for an SAE: leave one out")
        _convert_sae(options)
        return
    for name in ("format", "k"):
        if name in options:
            raise UserError(f"--{name} {options[name]} is for an SAE: name it with --sae")
    if config == Config():
        raise UserError("fac convert needs a CONFIG, whose backbone it converts, or --sae SAE")
    from fac_jax.backbone.adapter import Adapter
    from fac_jax.backbone.export import export_hf

    adapter = Adapter(options["adapter"]) if "adapter" in options else None
    print(f"written: {export_hf(config.backbone.model, options['to'], adapter=adapter)}")


def _convert_sae(options: dict[str, str]) -> None:
    form, k = options.get("format", "fac"), options.get("k")
    if form not in ("fac", "sae_lens"):
        raise UserError(f"--format is {form!r}{suggest(form, ('fac', 'sae_lens'))}; choose fac or sae_lens")
    if k is not None and not k.isdecimal():
        raise UserError(f"--k is {k!r}; it must be a whole number above 0")
    from fac_jax.sae.convert import convert_sae

    card = convert_sae(options["sae"], options["to"], typing.cast(typing.Any, form), None if k is None else int(k))
    active = "a threshold each" if card.k is None else f"K {card.k}"
    print(
        f"written: {options['to']} ({card.features:,} features of width {card.d_model}, layer {card.layer}, {active})"
    )


def plan(config: Config, verb: str, options: dict[str, str]) -> None:
    """What training and harvest would take on machines that are not here."""
    if "topology" not in options:
        raise UserError("fac plan needs --topology CHIP:SHAPE, such as v5e:4x4, v5p:4x4x4 or h100:16")
    from fac_jax.scale.plan import run

    run(config, options)


def sidecar(config: Config, verb: str, options: dict[str, str]) -> None:
    """Start, look at or stop the server on this machine that `llm.url` can name."""
    from fac_jax.llm import sidecar
    from fac_jax.progress import status_line

    if options["action"] == "start":
        with status_line() as line:
            server, seconds = sidecar.start(config, line.say, line.update)
        print(f"{server.model} ({server.kind}, process {server.process.pid}) answers at {server.url}; ", end="")
        print("it was running already" if seconds == 0 else f"it took {seconds:.0f} s")
        print(f"  log: {sidecar.log_file(config)}\n  use it with: {server.flags}")
    elif options["action"] == "status":
        print(sidecar.describe(config))
    else:
        stopped = sidecar.stop(config)
        print("no sidecar of this run is there" if stopped is None else sidecar.describe_end(*stopped))


def doctor(config: Config, verb: str, options: dict[str, str]) -> None:
    """What this machine offers and what the config needs from it."""
    from fac_jax.doctor import checks

    failed = 0
    for name, ok, finding in checks(config, "config" in options):
        failed += not ok
        Console(soft_wrap=True, highlight=False).print(f"{'[green]ok[/]  ' if ok else '[red]mend[/]'} {name}: ", end="")
        print(finding)
    if failed:
        raise UserError(f"{failed} of the checks above need mending")
