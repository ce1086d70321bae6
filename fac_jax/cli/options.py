"""Words behind a verb that are no settings of the config: taken out of the command line before the rest is parsed."""

from __future__ import annotations

from collections.abc import Mapping

from fac_jax.errors import UserError

SHORT = {"--max-cost": "--llm.max-cost", "--max-tokens": "--llm.max-tokens", "--select.from": "--select.source"}
FLAGS = ("search", "dry-run", "show-unsafe", "public", "publish-harmful")
"""Options that take no value."""
EXPORT = {
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
"""Those of `fac export`."""


def in_full(word: str) -> str:
    """A flag that stands for a longer one, spelled out."""
    flag, equals, value = word.partition("=")
    return SHORT.get(flag, flag) + equals + value


def take_options(rest: list[str], known: Mapping[str, str]) -> dict[str, str]:
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
