"""`fac VERB CONFIG [--section.field value]`: the command line, thin.

Parses a verb, a YAML file and dotted flags, runs the stages that the verb names, prints what they measured. Errors the
user can mend are one line without a traceback; Ctrl-C and a full disk keep everything that was committed.
`verbs.py` lists the verbs, `commands.py` holds what they do, `words.py` the few commands that read no config.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import select
import sys
import typing

import tyro
from rich.console import Console

from fac_jax import __version__
from fac_jax.cli import words
from fac_jax.cli.options import in_full, take_options
from fac_jax.cli.verbs import OPTIONS, VERBS, Verb
from fac_jax.config.data import DataSet, Source
from fac_jax.config.file import Config, load_config
from fac_jax.distributed import STOPPED, is_first, leave, start
from fac_jax.errors import Stopped, Unfinished, UserError
from fac_jax.plain import suggest

EXAMPLE = {"NAME": DataSet(sources=(Source(path="FILE"),))}
"""What help shows where no config says what its data sets are called."""
EXAMPLE_NOTE = (
    "\n\ndata.NAME stands for each data set that CONFIG names, sources.0 for its first source; data.NAME.without lists "
    "sources too, whose documents are left out."
)


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
    logging.getLogger("huggingface_hub").propagate = False  # it prints what it says itself
    logging.getLogger("orbax").setLevel(logging.CRITICAL)  # what it reports from its threads is raised as well
    tyro._experimental_options["ansi_codes"] = not os.environ.get("NO_COLOR")  # rich heeds it by itself
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
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):  # rich turns it into an end of its own
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
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_usage()
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"fac_jax {__version__}")
        return 0
    name, *rest = arguments
    if name not in VERBS:
        first = "; the verb comes first: fac VERB CONFIG [--section.field value ...]" if name.startswith("-") else ""
        hint = suggest(name, [*VERBS, "help"])
        print(f"fac has no verb {name!r}{hint}{first}; `fac --help` lists them", file=sys.stderr)
        return 2
    verb = VERBS[name]
    if rest == ["help"]:
        rest = ["--help"]
    if (status := words.run(name, rest)) is not None or verb.function is None:
        return status or 0
    action = rest.pop(0) if verb.actions and rest and not rest[0].startswith("-") else None
    if verb.actions and action not in verb.actions and "-h" not in rest and "--help" not in rest:
        what = f"has no {action!r}{suggest(action, verb.actions)}" if action else "needs to know what to do"
        print(f"fac {name} {what}; usage: {_usage(name, verb)}", file=sys.stderr)
        return 2
    if "-h" in rest or "--help" in rest:
        path = rest[0] if rest and not rest[0].startswith("-") else None
        _parse(name, verb, path, ["--help"], action=action)
        return 0
    if verb.needs_config and (not rest or rest[0].startswith("-")):
        print(f"usage: fac {name} CONFIG [--section.field value ...]; the YAML file comes first", file=sys.stderr)
        return 2
    rest = list(map(in_full, rest))
    options = take_options(rest, OPTIONS.get(name, {}))
    path = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if operand := verb.actions.get(action or "", ""):
        word = operand.partition(",")[0]
        if not rest or rest[0].startswith("-"):
            print(f"usage: fac {name} {action} CONFIG {operand}", file=sys.stderr)
            return 2
        options[word.lower()] = rest.pop(0)
    config = _parse(name, verb, path, rest, options.pop("on-bad-row", None), action)
    start(config.mesh)
    if not is_first():
        logging.getLogger().setLevel(logging.WARNING)
    said = {"action": action, "config": path}
    verb.function(config, name, options | {key: word for key, word in said.items() if word is not None})
    return 0


def _print_usage() -> None:
    print("fac: which features of a language model does a data set not exercise, and which samples would?\n")
    print(
        "usage: fac VERB CONFIG [--section.field value ...]   (fac VERB --help: every setting, with unit and source)\n"
    )
    for name, verb in VERBS.items():
        print(f"  {name:<11} {verb.help}")
    print("\nBegin with: fac run configs/quickstart.yaml")


def _usage(name: str, verb: Verb, action: str | None = None) -> str:
    """A verb as it is called, such as `fac samples show CONFIG SAMPLE`."""
    operand = verb.actions.get(action or "", "").partition(",")[0]
    what = action if action in verb.actions else "|".join(verb.actions)
    return " ".join(word for word in ("fac", name, what, "CONFIG", operand) if word)


def _parse(
    name: str, verb: Verb, path: str | None, flags: list[str], on_bad_row: str | None = None, action: str | None = None
) -> Config:
    """The config file with flags over it. Every flag is taken by every verb, since a product's identity may hang on it;
    the help shows the sections that the verb itself reads."""
    config = load_config(path) if path else Config()
    note = ""
    if "--help" in flags and path is None and "data" in verb.sections:
        config, note = dataclasses.replace(config, data=EXAMPLE), EXAMPLE_NOTE
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
    description = f"{verb.help}.{options}{note}"
    parsed = tyro.cli(view, prog=_usage(name, verb, action), description=description, args=flags, default=default)
    return dataclasses.replace(config, **{section: getattr(parsed, section) for section in sections})
