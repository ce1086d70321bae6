"""`fac VERB CONFIG [--section.field value]`: the command line, thin.

Parses a verb, a YAML file and dotted flags, runs the stages that the verb names, prints what they measured. Errors the
user can mend are one line without a traceback; Ctrl-C and a full disk keep everything that was committed.
Stages are imported inside the functions that run them, so that help and config errors come without loading jax.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import select
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from fac_jax import __version__
from fac_jax.config import Config, load_config
from fac_jax.distributed import STOPPED, is_first, leave, start
from fac_jax.errors import Stopped, Unfinished, UserError
from fac_jax.plain import suggest, to_plain
from fac_jax.runs import Run, Stage, write_text


@dataclass(frozen=True)
class Verb:
    """A command: what it does in a line, which sections of the config its help shows, and its function."""

    help: str
    sections: tuple[str, ...]
    function: Callable[[Config, str, dict[str, str]], None] | None
    """None for bench and store, which read no config and take arguments of their own."""
    needs_config: bool = True
    actions: tuple[str, ...] = ()
    """Words of which one comes before CONFIG; it reaches the function as options["action"]."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `fac`; returns the exit status.

    0 done, 1 error the user can mend, 2 usage, 130 Ctrl-C, 143 stopped by SIGTERM after saving; with several processes
    also 70 and 71 (`distributed.py`).
    """
    return leave(_main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that torch is missing: not needed
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "aiohttp", "transformers", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("orbax").setLevel(logging.CRITICAL)  # what it reports from its threads is raised as well
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        return _dispatch(arguments)
    except UserError as error:
        errors.print("[bold red]error:[/] ", end="")
        errors.print(str(error), markup=False)
        return 1
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return 0
    except Unfinished as unfinished:
        errors.print(str(unfinished), markup=False)
        return 0
    except Stopped as stopped:
        errors.print(f"{stopped}; the same command goes on from there:", markup=False)
        errors.print("  fac " + " ".join(arguments), markup=False)
        return STOPPED
    except KeyboardInterrupt:
        errors.print("stopped by Ctrl-C; everything committed is kept, and the same command goes on from it:")
        errors.print("  fac " + " ".join(arguments), markup=False)
        return 130
    except Exception as error:  # libraries say it in their own ways (orbax a ValueError, safetensors its own)
        if getattr(error, "errno", None) != errno.ENOSPC and os.strerror(errno.ENOSPC) not in str(error):
            raise
        errors.print("[bold red]error:[/] ", end="")
        place = f" at {name}" if (name := getattr(error, "filename", None)) else ""
        errors.print(
            f"the disk is full{place}; free space and run the same command again, what is committed is kept",
            markup=False,
        )
        return 1


def _reader_has_gone() -> bool:
    """Whether nobody reads standard output any more, as after `| head`; what is left to print then goes nowhere."""
    output = select.poll()
    output.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_usage()
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"fac_jax {__version__}")
        return 0
    name, *rest = arguments
    if name not in VERBS:
        print(f"fac has no verb {name!r}{suggest(name, VERBS)}; `fac --help` lists them", file=sys.stderr)
        return 2
    verb = VERBS[name]
    if verb.function is None:
        return _store(rest) if name == "store" else _bench(rest)
    if name == "scan" and rest[:1] == ["merge"]:
        return _merge_scans(rest[1:])
    if name == "coverage" and any(word.partition("=")[0] == "--vs" for word in rest):
        return _compare(rest)
    action = rest.pop(0) if verb.actions and rest and not rest[0].startswith("-") else None
    if verb.actions and action not in verb.actions and "-h" not in rest and "--help" not in rest:
        what = f"has no {action!r}{suggest(action, verb.actions)}" if action else "needs to know what to do"
        print(f"fac {name} {what}; usage: fac {name} {'|'.join(verb.actions)} CONFIG", file=sys.stderr)
        return 2
    if "-h" in rest or "--help" in rest:
        _parse(name, verb, rest[0] if rest and not rest[0].startswith("-") else None, ["--help"])
        return 0
    if verb.needs_config and (not rest or rest[0].startswith("-")):
        print(f"usage: fac {name} CONFIG [--section.field value ...]; the YAML file comes first", file=sys.stderr)
        return 2
    rest = list(map(_in_full, rest))
    options = _take_options(rest, OPTIONS.get(name, {}))
    path = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if name == "samples" and action == "show":
        if not rest or rest[0].startswith("-"):
            print(
                "usage: fac samples show CONFIG SAMPLE, such as f812-s2-0; `fac samples list CONFIG` names them",
                file=sys.stderr,
            )
            return 2
        options["sample"] = rest.pop(0)
    config = _parse(name, verb, path, rest, options.pop("on-bad-row", None))
    start(config.mesh)
    if not is_first():
        logging.getLogger().setLevel(logging.WARNING)
    verb.function(config, name, options | ({"action": action} if action else {}))
    return 0


def _print_usage() -> None:
    print("fac: which features of a language model does a data set not exercise, and which samples would?\n")
    print(
        "usage: fac VERB CONFIG [--section.field value ...]   (fac VERB --help: every setting, with unit and source)\n"
    )
    for name, verb in VERBS.items():
        print(f"  {name:<11} {verb.help}")
    print("\nBegin with: fac run configs/quickstart.yaml")


def _in_full(word: str) -> str:
    """A flag that stands for a longer one, spelled out."""
    flag, equals, value = word.partition("=")
    return SHORT.get(flag, flag) + equals + value


def _take_options(rest: list[str], known: dict[str, str]) -> dict[str, str]:
    """Remove `--name value` of a verb's own options from `rest`."""
    found = {}
    for name in known:
        for index, word in enumerate(rest):
            if word == f"--{name}" or word.startswith(f"--{name}="):
                _, equals, value = word.partition("=")
                if name in FLAGS:
                    found[name] = rest.pop(index)
                    break
                if not equals and (index + 1 == len(rest) or rest[index + 1].startswith("--")):
                    raise UserError(f"--{name} needs a value: {known[name]}")
                found[name] = value if equals else rest.pop(index + 1)
                rest.pop(index)
                break
    return found


def _parse(name: str, verb: Verb, path: str | None, flags: list[str], on_bad_row: str | None = None) -> Config:
    """The config file with flags over it. Every flag is taken by every verb, since a product's identity may hang on it;
    the help shows the sections that the verb itself reads."""
    config = load_config(path) if path else Config()
    if on_bad_row is not None:
        choice: typing.Literal["stop", "skip"] = "skip" if on_bad_row == "skip" else "stop"
        if on_bad_row != choice:
            raise UserError(f"--on-bad-row is {on_bad_row!r}; choose stop or skip")
        data = {key: dataclasses.replace(value, on_bad_row=choice) for key, value in config.data.items()}
        config = dataclasses.replace(config, data=data)
    kinds = typing.get_type_hints(Config)
    shown = verb.sections if "--help" in flags else tuple(kinds)
    sections = [section for section in shown if getattr(config, section) != {}]
    view = dataclasses.make_dataclass("Settings", [(section, kinds[section]) for section in sections], frozen=True)
    default = view(*(getattr(config, section) for section in sections))
    options = "".join(f"\n\n--{key} {text}" for key, text in OPTIONS.get(name, {}).items())
    description = f"{verb.help}.{options}"
    parsed = tyro.cli(view, prog=f"fac {name} CONFIG", description=description, args=flags, default=default)
    return dataclasses.replace(config, **{section: getattr(parsed, section) for section in sections})


def _run(config: Config, verb: str, options: dict[str, str]) -> None:
    """All stages in order, then the summary."""
    from fac_jax.pipeline import pipeline, run_stages

    stages = pipeline(config)
    if "dry-run" in options:
        _dry_run(config, list(stages))
        return
    with Run(config) as run:
        wanted = [name for name, stage in stages.items() if not stage.on_request]
        run_stages(run, stages, [name for name in wanted if name != "report"])
        _write_report(run, stages, options)


def _report(config: Config, verb: str, options: dict[str, str]) -> None:
    """The report on whatever is there."""
    from fac_jax.pipeline import pipeline

    with Run(config) as run:
        _write_report(run, pipeline(config), options)


def _write_report(run: Run, stages: dict[str, Stage], options: dict[str, str]) -> None:
    """The page, which names the commands for stages that are not done; the findings, and where the page is."""
    from fac_jax.pipeline import run_stages
    from fac_jax.report.terminal import summary

    done = {name for name, stage in stages.items() if run.state(stage, stages)[0] == "done"}
    inputs = tuple(name for name in stages["report"].inputs if name in done)
    run_stages(run, stages | {"report": dataclasses.replace(stages["report"], inputs=inputs)}, ["report"])
    Console().print(summary(run.dir, unsafe="show-unsafe" in options))
    print(f"report: {(run.dir / 'report' / 'index.html').resolve()}")


def _stage(config: Config, verb: str, options: dict[str, str]) -> None:
    """The stages that carry the verb's name."""
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
        if verb == "finetune":
            raise UserError(
                f"fac finetune trains a classifier, whose AUPRC is measured; samples of task {config.judge.task!r} are "
                "for another kind of training, which is not here yet: `fac export` writes them for programs that do it"
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
            print(f"{stage.name}: {run.folder(stage)}  ({record.seconds:.1f} s, {record.finished})")
            for key, value in record.summary.items():
                print(f"  {key}: {value:,}" if isinstance(value, (int, float)) else f"  {key}: {value}")


def _diversity(config: Config, verb: str, options: dict[str, str]) -> None:
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
            print(f"{stage.name}: {run.folder(stage)}  ({record.seconds:.1f} s, {record.finished})")
        shown = table([read_product(run.folder(stage)) for stage, _ in made])
    Console(width=None if sys.stdout.isatty() else 160).print(shown)


def _ablate(config: Config, verb: str, options: dict[str, str]) -> None:
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
            print(f"{stage.name}: {run.folder(stage)}  ({record.seconds:.1f} s, {record.finished})")
            shown = table(json.loads((run.folder(stage) / "ablation.json").read_text(encoding="utf-8")))
    Console(width=None if sys.stdout.isatty() else 200).print(shown)


def _dry_run(config: Config, wanted: list[str]) -> None:
    """What the stages would ask of the server, and what it would cost."""
    from fac_jax.dry_run import estimates, table

    Console(width=None if sys.stdout.isatty() else 120).print(table(config, estimates(config, wanted)))


def _samples(config: Config, verb: str, options: dict[str, str]) -> None:
    """What synthesis kept, or the story of one sample."""
    from fac_jax.report.samples import listing, printed, read_story

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    run_dir, unsafe = Path(config.run.dir), "show-unsafe" in options
    if options["action"] == "list":
        console.print(listing(run_dir, config, unsafe))
        return
    story, harmful = read_story(run_dir, config, options["sample"])
    console.print(printed(story, harmful and not unsafe))
    if "out" in options:
        write_text(Path(options["out"]), json.dumps(to_plain(story), indent=1))
        print(f"written: {options['out']}")


def _export(config: Config, verb: str, options: dict[str, str]) -> None:
    """The kept samples as another program's files."""
    from fac_jax.synthesis.export.export import Hub, export

    for needed in ("format", "to"):
        if needed not in options:
            raise UserError(f"fac export needs --{needed} {OPTIONS['export'][needed]}")
    if "push" not in options and (
        asked := next((flag for flag in ("public", "publish-harmful") if flag in options), "")
    ):
        raise UserError(f"--{asked} says who may see what --push OWNER/NAME uploads, and there is no --push")
    hub = Hub(options["push"], "public" in options, "publish-harmful" in options) if "push" in options else None
    done = export(config, options["format"], Path(options["to"]), options.get("name"), hub)
    print(f"written: {done.folder} ({done.samples:,} samples): {', '.join(done.files)}")
    if done.address is not None:
        print(f"pushed: {done.address} ({'public' if 'public' in options else 'private'})")


def _status(config: Config, verb: str, options: dict[str, str]) -> None:
    """One line a stage: done, outdated, half made or absent. Products are named from the run directory."""
    from fac_jax.pipeline import pipeline

    stages = pipeline(config)
    run = Run(config)
    table = Table("stage", "state", "made", "seconds", "product", "command", box=None)
    table.columns[3].justify = "right"
    for stage in stages.values():
        state, record = run.state(stage, stages)
        made, seconds = (record.finished, f"{record.seconds:.1f}") if record else ("", "")
        table.add_row(stage.name, state, made, seconds, stage.folder, stage.command)
    print(f"run directory: {run.dir}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _convert(config: Config, verb: str, options: dict[str, str]) -> None:
    """Write an SAE in another form, or the backbone as a Hugging Face directory, for servers that read no GGUF."""
    if "to" not in options:
        raise UserError("fac convert needs --to FOLDER, the folder to write")
    if "sae" in options:
        _convert_sae(options)
        return
    for name in ("format", "k"):
        if name in options:
            raise UserError(f"--{name} {options[name]} is for an SAE: name it with --sae")
    if config == Config():
        raise UserError("fac convert needs a CONFIG, whose backbone it converts, or --sae SAE")
    from fac_jax.backbone.export import export_hf

    print(f"written: {export_hf(config.backbone.model, options['to'])}")


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


STORE_USAGE = """usage: fac store info PATH                what the store (or stores) at PATH, a folder or URL, holds
       fac store verify PATH              read every block; name and quarantine the damaged ones (then the status is 1)
       fac store merge INTO PATH PATH...  a store of the rows of several, which stay where they are
       fac store drop PATH WRITER         delete what one writer (such as p0001) wrote"""


def _store(arguments: list[str]) -> int:
    """Look after activation stores; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(STORE_USAGE)
        return 0 if arguments else 2
    action, *paths = arguments
    numbers = {"info": (1, 1), "verify": (1, 1), "merge": (3, 10**6), "drop": (2, 2)}
    if action not in numbers:
        raise UserError(f"fac store has no {action!r}{suggest(action, numbers)}\n{STORE_USAGE}")
    least, most = numbers[action]
    if not least <= len(paths) <= most or any(path.startswith("-") for path in paths):
        raise UserError(f"`fac store {' '.join(arguments)}` has too few or too many words\n{STORE_USAGE}")
    from fac_jax.activations import upkeep

    if action == "verify":
        found = upkeep.verify(paths[0])
        for line in [*found, *(upkeep.remedies(found) if found else ["every block is whole"])]:
            print(line)
        return 1 if found else 0
    if action == "info":
        lines = upkeep.info(paths[0])
    else:
        lines = upkeep.merge(paths[0], paths[1:]) if action == "merge" else upkeep.drop(*paths)
    print("\n".join(lines))
    return 0


MERGE_USAGE = """usage: fac scan merge INTO FROM FROM...   one scan, in the new folder INTO, of several

Each FROM is a scan's folder, such as runs/quickstart/scans/anchor: finished scans of different data sets, made with the
same model and SAE; or the shares of one data set that --scan.share made in several run directories."""


def _merge_scans(arguments: list[str]) -> int:
    """Scans to one scan; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(MERGE_USAGE)
        return 0 if arguments else 2
    into, *folders = arguments
    if not folders or any(word.startswith("-") for word in arguments):
        raise UserError(f"`fac scan merge {' '.join(arguments)}` has too few words, or flags\n{MERGE_USAGE}")

    from fac_jax.scan.merge import merge_scans

    counts = merge_scans(Path(into), [Path(folder) for folder in folders])
    print(f"{into}: {counts['documents']:,} documents, {counts['active_features']:,} active features")
    return 0


COMPARE_USAGE = "usage: fac coverage SCAN_A --vs SCAN_B"
COMPARE = {
    "vs": "SCAN: folder of a finished scan, such as runs/quickstart/scans/anchor, as SCAN_A is",
    "threshold": "NUMBER: a feature is covered when its peak exceeds it (default: coverage.threshold's)",
    "relevance": "FOLDER: a relevance product: only the features that it calls relevant count (default: all)",
    "spans": "N: passages kept of each feature (default: 3)",
    "out": "FOLDER: compare.json, compare.parquet (every feature) and compare.svg are written there",
    "show-unsafe": "print passages, which may be harmful",
}


def _compare(arguments: list[str]) -> int:
    """What either of two scans covers that the other does not; returns the exit status."""
    rest = list(arguments)
    if "-h" in rest or "--help" in rest:
        print(COMPARE_USAGE + "".join(f"\n  --{name} {text}" for name, text in COMPARE.items()))
        return 0
    options = _take_options(rest, COMPARE)
    if len(rest) != 1 or rest[0].startswith("-"):
        raise UserError(f"`fac coverage {' '.join(arguments)}` needs one scan beside --vs: {COMPARE_USAGE} --help")

    from fac_jax.config import CoverageConfig
    from fac_jax.coverage import compare as module

    try:
        threshold = float(options.get("threshold", CoverageConfig.threshold))
        spans = int(options.get("spans", 3))
    except ValueError as error:
        raise UserError(f"--threshold and --spans must be numbers ({error})") from None
    relevance = Path(options["relevance"]) if "relevance" in options else None
    figures, table = module.compare(Path(rest[0]), Path(options["vs"]), threshold, relevance, spans)
    Console(width=None if sys.stdout.isatty() else 120).print(module.printed(figures, table, "show-unsafe" in options))
    if "out" in options:
        module.write(Path(options["out"]), figures, table)
        (Path(options["out"]) / "compare.svg").write_text(_curves(figures), encoding="utf-8")
        print(f"written: {options['out']}/compare.json, compare.parquet, compare.svg")
    return 0


def _curves(figures: dict[str, typing.Any]) -> str:
    """Both sets' coverage against how much text was taken, as SVG."""
    import math

    from fac_jax.report.figures import Series, line_figure, standalone

    series = []
    for colour, (side, curve) in enumerate(zip("ab", figures["curves"], strict=True), 1):
        points = [(math.log10(max(t, 1)), c) for t, c in zip(curve["content_tokens"], curve["covered"], strict=True)]
        series.append(Series(figures[side]["name"], points, colour))
    title = f"Features covered, expected (peaks above {figures['threshold']:g})"
    return standalone(line_figure(title, series, "content tokens, powers of ten", from_zero=True))


def _bench(arguments: list[str]) -> int:
    from fac_jax.scale.bench import main as bench

    return bench(arguments)


def _plan(config: Config, verb: str, options: dict[str, str]) -> None:
    """What training and harvest would take on machines that are not here."""
    if "topology" not in options:
        raise UserError("fac plan needs --topology CHIP:SHAPE, such as v5e:4x4, v5p:4x4x4 or h100:16")
    from fac_jax.scale.plan import run

    run(config, options)


def _sidecar(config: Config, verb: str, options: dict[str, str]) -> None:
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


def _doctor(config: Config, verb: str, options: dict[str, str]) -> None:
    """What this machine offers and what the config needs from it."""
    from fac_jax.doctor import checks

    failed = 0
    for name, ok, finding in checks(config):
        failed += not ok
        Console(soft_wrap=True, highlight=False).print(f"{'[green]ok[/]  ' if ok else '[red]mend[/]'} {name}: ", end="")
        print(finding)
    if failed:
        raise UserError(f"{failed} of the checks above need mending")


_ALL = tuple(section.name for section in dataclasses.fields(Config))
_BASE = ("run", "mesh", "backbone", "data")

VERBS = {
    "run": Verb("the whole pipeline, skipping what is done", _ALL, _run),
    "harvest": Verb("corpus to activation store", (*_BASE, "harvest"), _stage),
    "train": Verb(
        "activation store, or the backbone live, to sparse autoencoder", (*_BASE, "harvest", "sae", "train"), _stage
    ),
    "sweep": Verb(
        "several autoencoders (layer, k, width, kind, seed), those of a layer from one reading of its rows, side by "
        "side in the report",
        *((*_BASE, "harvest", "sae", "train", "sweep"), _stage),
    ),
    "splice": Verb(
        "the model's loss with the autoencoder spliced in", (*_BASE, "harvest", "train", "scan", "splice"), _stage
    ),
    "scan": Verb(
        "a corpus to per-feature statistics, spans and per-sample peaks; `fac scan merge INTO FROM...` joins scans",
        *((*_BASE, "coverage", "scan"), _stage),
    ),
    "explain": Verb("features to text", ("run", "mesh", "backbone", "explain", "llm"), _stage),
    "judge": Verb("features to task relevance", ("run", "judge", "llm"), _stage),
    "coverage": Verb(
        "what the seed set covers of the anchor, and what it misses; `fac coverage SCAN_A --vs SCAN_B`: of two scans",
        *(("run", "coverage"), _stage),
    ),
    "synthesize": Verb(
        "missing features to samples that activate them",
        ("run", "mesh", "backbone", "coverage", "synthesize", "llm"),
        _stage,
    ),
    "ablate": Verb(
        "synthesis with one thing changed at a time, over several seeds (configs/ablations has the paper's)",
        *(("run", "mesh", "backbone", "coverage", "synthesize", "ablation", "llm"), _ablate),
    ),
    "diversity": Verb(
        "how diverse a data set is by the metrics of others: n-grams, syntax, embeddings",
        *(("run", "data", "coverage", "diversity"), _diversity),
    ),
    "evaluate": Verb("coverage of the seed set with what was synthesised", ("run", "coverage"), _stage),
    "select": Verb("existing documents that cover what is missing", ("run", "coverage", "select"), _stage),
    "finetune": Verb("a classifier with and without the synthetic samples", (*_BASE, "coverage", "finetune"), _stage),
    "report": Verb("one offline HTML page of the run", ("run",), _report),
    "samples": Verb(
        "`fac samples list CONFIG`, `fac samples show CONFIG SAMPLE`: what was kept, and all that proves one",
        *(("run", "coverage"), _samples, True, ("list", "show")),
    ),
    "export": Verb("kept samples to files that other programs load, or to the hub", ("run", "judge"), _export),
    "status": Verb("what is done, outdated or missing in the run directory", _ALL, _status),
    "convert": Verb(
        "the backbone (a GGUF file, say) to a Hugging Face directory; with --sae, an SAE to another program's form",
        *(("backbone",), _convert, False),
    ),
    "store": Verb("`fac store info|verify|merge|drop PATH`: look after activation stores", (), None, False),
    "bench": Verb(
        "`fac bench sae|activations|scan`: our training step, harvest, store, stream and scan beside others'",
        *((), None, False),
    ),
    "plan": Verb(
        "what training and harvest would take on a pod that is not here: memory, time, network (predicted)",
        *(("mesh", "backbone", "harvest", "sae", "train"), _plan),
    ),
    "sidecar": Verb(
        "`fac sidecar start|status|stop CONFIG`: a server on this machine (vLLM, or a light one) for --llm.url",
        *(("run", "backbone", "llm", "sidecar"), _sidecar, True, ("start", "status", "stop")),
    ),
    "doctor": Verb("what this machine offers, and whether the config can run on it", _ALL, _doctor, needs_config=False),
}

# Which rows were left out is part of what a product is made from, so every verb has to be told, as of any setting.
_EVERY = {"on-bad-row": "stop|skip: what a malformed corpus row does, in every data set"}
OPTIONS = {name: dict(_EVERY) for name, verb in VERBS.items() if verb.needs_config}
OPTIONS["scan"]["data"] = "NAME: the data set to scan (default: the anchor, the seed and the held-out set)"
OPTIONS["diversity"]["data"] = (
    "NAME: the data set to measure, or what synthesis wrote: kept, random (default: the seed and the anchor)"
)
OPTIONS["convert"] = {
    "to": "FOLDER: the folder to write, which must be empty or absent",
    "sae": (
        "SAE: convert this SAE and not the backbone (no CONFIG is needed): a folder of ours or of SAELens, a .pth file "
        "that the paper's authors published, or a hub id OWNER/NAME or OWNER/NAME/FOLDER-OR-FILE-IN-IT"
    ),
    "format": "fac|sae_lens: with --sae, what to write (default: fac, which --scan.sae reads; it reads the others too)",
    "k": "K: with --sae, another number of features that a token keeps (a .pth file may hold that of mid-training)",
}
OPTIONS["plan"].update(
    {
        "topology": (
            "CHIP:SHAPE: v5e:4x4, v5p:4x4x4 (64 chips), v6e:8x8, tpu7x:2x2x1, h100:16, h200:8; libtpu compiles for "
            "TPUs, where it is installed (bash launch/plan.sh does it)"
        ),
        "slices": "N: so many TPU slices of that shape, joined by the slower network (default: 1)",
        "search": "try all meshes and several batch sizes, and plan the fastest that fits",
        "tokens": "N: the budget that days are for (default: train.steps x train.batch_rows, and harvest.tokens)",
        "out": "FILE: a JSON file to write",
    }
)
OPTIONS["export"].update(
    {
        "format": (
            "NAME: of any samples hf (a data set folder with its card); of instructions trl_sft, llama_factory, "
            "alpaca_eval; of preference pairs trl_reward, trl_preference, llama_factory, rewardbench; of two choices "
            "caa; of user turns official_tsv"
        ),
        "to": "FOLDER: the folder to write, which must be empty or absent; llama_factory also adds to one of its own",
        "name": "NAME: what LLaMA-Factory and AlpacaEval are to call the data set (default: fac_TASK)",
        "push": "OWNER/NAME: with hf, also upload it to the hub, private; the key is HF_TOKEN's",
        "public": "with --push: everyone may see it",
        "publish-harmful": "with --public: also what a task about harm wrote, behind a gate with access by hand",
    }
)
OPTIONS["samples"]["out"] = "FILE: with show, a JSON file to write, texts included"
for _showing in ("run", "report", "samples"):
    OPTIONS[_showing]["show-unsafe"] = (
        "print passages, and explanations of a task about harm, which are hidden otherwise"
    )
for _asking in ("run", "explain", "judge", "synthesize"):
    OPTIONS[_asking]["dry-run"] = "say what the server would be asked and what it would cost; ask and write nothing"
    OPTIONS[_asking]["max-cost"] = "MONEY: short for --llm.max-cost, what the run directory may spend on answers"
    OPTIONS[_asking]["max-tokens"] = "N: short for --llm.max-tokens, read and written"
SHORT = {"--max-cost": "--llm.max-cost", "--max-tokens": "--llm.max-tokens", "--select.from": "--select.source"}
FLAGS = ("search", "dry-run", "show-unsafe", "public", "publish-harmful")
"""Options that take no value."""


if __name__ == "__main__":
    sys.exit(main())
