"""The verbs of `fac`: what each does in a line, the sections of the config that its help shows, options of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fac_jax.cli import commands
from fac_jax.cli.options import EXPORT
from fac_jax.config.file import Config


@dataclass(frozen=True)
class Verb:
    """A command: what it does in a line, which sections of the config its help shows, and its function."""

    help: str
    sections: tuple[str, ...]
    function: Callable[[Config, str, dict[str, str]], None] | None
    """None for bench and store, which read no config and take arguments of their own."""
    needs_config: bool = True
    actions: Mapping[str, str] = field(default_factory=dict)
    """Words of which one comes before CONFIG, and the operand that each takes behind it, if any; they reach the
    function as options["action"] and under the operand's name."""


_ALL = tuple(section.name for section in dataclasses.fields(Config))
_BASE = ("run", "mesh", "backbone", "data")

VERBS = {
    "run": Verb("the whole pipeline, skipping what is done", _ALL, commands.run),
    "harvest": Verb("corpus to activation store", (*_BASE, "harvest"), commands.stage),
    "train": Verb(
        "activation store, or the backbone live, to sparse autoencoder",
        (*_BASE, "harvest", "sae", "train"),
        commands.stage,
    ),
    "sweep": Verb(
        "several autoencoders (layer, k, width, kind, seed), those of a layer from one reading of its rows, side by "
        "side in the report",
        *((*_BASE, "harvest", "sae", "train", "sweep"), commands.stage),
    ),
    "splice": Verb(
        "the model's loss with the autoencoder spliced in",
        (*_BASE, "harvest", "train", "scan", "splice"),
        commands.stage,
    ),
    "scan": Verb(
        "a corpus to per-feature statistics, spans and per-sample peaks; `fac scan merge INTO FROM...` joins scans",
        *((*_BASE, "coverage", "scan"), commands.stage),
    ),
    "explain": Verb("features to text", ("run", "mesh", "backbone", "explain", "llm"), commands.stage),
    "judge": Verb("features to task relevance", ("run", "judge", "llm"), commands.stage),
    "coverage": Verb(
        "what the seed set covers of the anchor, and what it misses; `fac coverage SCAN_A --vs SCAN_B`: of two scans",
        *(("run", "coverage"), commands.stage),
    ),
    "synthesize": Verb(
        "missing features to samples that activate them",
        ("run", "mesh", "backbone", "coverage", "synthesize", "llm"),
        commands.stage,
    ),
    "ablate": Verb(
        "synthesis with one thing changed at a time, over several seeds (configs/ablations has the paper's)",
        *(("run", "mesh", "backbone", "coverage", "synthesize", "ablation", "llm"), commands.ablate),
    ),
    "diversity": Verb(
        "how diverse a data set is by the metrics of others: n-grams, syntax, embeddings",
        *(("run", "data", "coverage", "diversity"), commands.diversity),
    ),
    "evaluate": Verb("coverage of the seed set with what was synthesised", ("run", "coverage"), commands.stage),
    "select": Verb("existing documents that cover what is missing", ("run", "coverage", "select"), commands.stage),
    "finetune": Verb(
        "a classifier, a reward model or an instruction model, by the task, with and without the synthetic samples",
        *((*_BASE, "coverage", "judge", "finetune", "llm"), commands.stage),
    ),
    "study": Verb(
        "does it help? ways to add samples to the seed, by what a classifier trained on them detects (and coverage and "
        "every metric of diversity, and how they go with it)",
        *((*_BASE, "coverage", "synthesize", "diversity", "finetune", "study", "llm"), commands.stage),
    ),
    "steer": Verb(
        "a steering vector from samples with two choices, and what it does to held-out questions",
        *(("run", "mesh", "backbone", "steer"), commands.stage),
    ),
    "report": Verb("one offline HTML page of the run", ("run",), commands.report),
    "samples": Verb(
        "`fac samples list CONFIG`, `fac samples show CONFIG SAMPLE`: what was kept, and all that proves one",
        *(("run", "coverage"), commands.samples, True),
        {"list": "", "show": "SAMPLE, such as f812-s2-0; `fac samples list CONFIG` names them"},
    ),
    "export": Verb("kept samples to files that other programs load, or to the hub", ("run", "judge"), commands.export),
    "status": Verb("what is done, outdated or missing in the run directory", _ALL, commands.status),
    "convert": Verb(
        "the backbone (a GGUF file, or with --adapter) to a Hugging Face directory; with --sae, an SAE to another form",
        *(("backbone",), commands.convert, False),
    ),
    "store": Verb("`fac store info|verify|merge|drop PATH`: look after activation stores", (), None, False),
    "bench": Verb(
        "`fac bench sae|activations|scan`: our training step, harvest, store, stream and scan beside others'",
        *((), None, False),
    ),
    "plan": Verb(
        "what training and harvest would take on a pod that is not here: memory, time, network (predicted)",
        *(("mesh", "backbone", "harvest", "sae", "train"), commands.plan),
    ),
    "sidecar": Verb(
        "`fac sidecar start|status|stop CONFIG`: a server on this machine (vLLM, or a light one) for --llm.url",
        *(
            ("run", "backbone", "llm", "sidecar"),
            commands.sidecar,
            True,
            dict.fromkeys(("start", "status", "stop"), ""),
        ),
    ),
    "doctor": Verb(
        "what this machine offers, and whether the config can run on it", _ALL, commands.doctor, needs_config=False
    ),
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
    "adapter": "FOLDER: merge this LoRA into the backbone: finetune/arms/ARM/seed-N of a run, or one that peft wrote",
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
OPTIONS["export"].update(EXPORT)
OPTIONS["samples"]["out"] = "FILE: with show, a JSON file to write, texts included"
for _showing in ("run", "report", "samples"):
    OPTIONS[_showing]["show-unsafe"] = (
        "print passages, and explanations of a task about harm, which are hidden otherwise"
    )
for _asking in ("run", "explain", "judge", "synthesize"):
    OPTIONS[_asking]["dry-run"] = "say what the server would be asked and what it would cost; ask and write nothing"
    OPTIONS[_asking]["max-cost"] = "MONEY: short for --llm.max-cost, what the run directory may spend on answers"
    OPTIONS[_asking]["max-tokens"] = "N: short for --llm.max-tokens, read and written"
