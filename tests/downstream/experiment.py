"""A run's folder with what synthesis wrote by hand, in which `fac finetune` trains what has no scans."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fac_jax.config.file import Config
from fac_jax.downstream.finetune import finetune
from fac_jax.downstream.tune import tune
from fac_jax.errors import Stopped


@dataclasses.dataclass
class Experiment:
    """A run's folder; `run` trains."""

    folder: Path
    config: Config

    @property
    def out(self) -> Path:
        return self.folder / "finetune"

    def run(self, **settings: Any) -> dict[str, Any]:
        self.config = dataclasses.replace(self.config, finetune=dataclasses.replace(self.config.finetune, **settings))
        self.out.mkdir(exist_ok=True)
        return finetune(self.config, self.out, {"synthesis": self.folder})

    def evaluation(self) -> dict[str, Any]:
        return json.loads((self.out / "eval.json").read_text())

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))


def stopping_before(arm: str) -> Callable[[Any, Any, int, Path], Any]:
    """Trains as ever, and is stopped when an arm's turn comes."""

    def tiring(tuner: Any, groups: Any, seed: int, folder: Path) -> Any:
        if folder.parent.name == arm:
            raise Stopped("SIGTERM")
        return tune(tuner, groups, seed, folder)

    return tiring
