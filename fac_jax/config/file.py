"""One YAML file (over another that it names as its base), and dotted flags over it, become frozen dataclasses.

Reads YAML files; writes the resolved config (`to_yaml`) so that every product can keep the one it was made with.
Every field's docstring is its `--help`; where the paper (arXiv 2602.10388) or its code gives a value, it is quoted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fac_jax.config.activations import BackboneConfig, HarvestConfig
from fac_jax.config.checks import check
from fac_jax.config.coverage import CoverageConfig, DiversityConfig, SelectConfig
from fac_jax.config.data import DataSet
from fac_jax.config.downstream import FinetuneConfig, SteerConfig, StudyConfig
from fac_jax.config.features import ExplainConfig, JudgeConfig, ScanConfig
from fac_jax.config.llm import LlmConfig, SidecarConfig
from fac_jax.config.machine import MeshConfig, RunConfig
from fac_jax.config.sae import SaeConfig, SpliceConfig, SweepConfig, TrainConfig
from fac_jax.config.synthesis import AblationConfig, SynthesizeConfig
from fac_jax.errors import UserError
from fac_jax.plain import from_plain, suggest, to_plain


@dataclass(frozen=True)
class Config:
    """Everything a run is made from."""

    run: RunConfig = RunConfig()
    mesh: MeshConfig = MeshConfig()
    backbone: BackboneConfig = BackboneConfig()
    data: dict[str, DataSet] = field(default_factory=dict)
    """Data sets by name."""
    harvest: HarvestConfig = HarvestConfig()
    sae: SaeConfig = SaeConfig()
    train: TrainConfig = TrainConfig()
    sweep: SweepConfig = SweepConfig()
    splice: SpliceConfig = SpliceConfig()
    scan: ScanConfig = ScanConfig()
    explain: ExplainConfig = ExplainConfig()
    judge: JudgeConfig = JudgeConfig()
    coverage: CoverageConfig = CoverageConfig()
    diversity: DiversityConfig = DiversityConfig()
    synthesize: SynthesizeConfig = SynthesizeConfig()
    ablation: AblationConfig = AblationConfig()
    select: SelectConfig = SelectConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    study: StudyConfig = StudyConfig()
    steer: SteerConfig = SteerConfig()
    llm: LlmConfig = LlmConfig()
    sidecar: SidecarConfig = SidecarConfig()

    def __post_init__(self) -> None:
        steered = {"synthesize.steer": self.synthesize.steer}
        steered |= {f"ablation.arms.{name}.steer": arm.steer or () for name, arm in self.ablation.arms.items()}
        for name, strengths in steered.items():
            check(
                not strengths or self.llm.url is None,
                f"{name} is {strengths} and llm.url {self.llm.url}: only the embedded writer can be steered; leave out "
                f"{name}, or set llm.url to null",
            )

    @property
    def harvested_layers(self) -> tuple[int, ...]:
        """The layers that a harvest keeps, rising."""
        return tuple(sorted({self.backbone.layer, *self.harvest.layers}))

    def method_of(self, stage: ExplainConfig | JudgeConfig) -> Literal["embedded", "llm"]:
        """Whether a server explains or judges, as that part of the config (`explain` or `judge`) has it."""
        return "embedded" if self.llm.url is None or stage.method == "embedded" else "llm"

    def dataset(self, name: str) -> DataSet:
        """The data set called `name`, or an error that lists the names there are."""
        if name not in self.data:
            hint = suggest(name, self.data)
            raise UserError(
                f"no data set is called {name!r} under data:{hint}; there are: {', '.join(self.data) or 'none'}"
            )
        return self.data[name]


def load_config(path: str | Path) -> Config:
    """Read a YAML file strictly; a file that it names under `base` (beside it) gives what it does not say itself.

    Raises UserError for a missing file, bad YAML, an unknown key, a wrong type, or files that are each other's base.
    """
    return from_plain(Config, _read(Path(path), ()), str(path))


def to_yaml(config: Config) -> str:
    """The resolved config; `load_config` of it gives the same config back."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A file over its base, as plain values; `above` are the files that led to it."""
    try:
        raw = _values(path, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = f"base of {above[-1]}" if above else "configs/quickstart.yaml is one to start from"
        raise UserError(f"config {path} does not exist; {hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"config {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"config {path} cannot be read ({error.strerror}); name a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"config {path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict) or "base" not in raw:
        return raw or {}
    base = raw.pop("base")
    check(isinstance(base, str), f"config {path}: base is {base!r}; it must be the path of a YAML file, from this one")
    here = path.resolve()
    if here in above:
        raise UserError(f"config {path} is its own base, by way of {' and '.join(map(str, above))}; take one base out")
    under = _read(path.parent / base, (*above, here))
    from_plain(Config, under, str(path.parent / base))  # what is wrong with the base is said of the base
    return _over(under, raw)


def _values(path: Path, text: str) -> Any:
    """What `yaml.safe_load` gives; it takes the last of two equal keys without a word, which is an error here."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check_keys(path, root)
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _check_keys(path: Path, root: yaml.Node) -> None:
    """Raise UserError for a key that a mapping has twice; what `<<` merges is not yet in it."""
    waiting, seen = [root], set[int]()  # an anchored node is met again at each of its aliases
    while waiting:
        node = waiting.pop(0)
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(None, value) for value in node.value]
        lines: dict[str, int] = {}
        for key, value in pairs:
            if isinstance(key, yaml.ScalarNode):
                name, line = key.value, key.start_mark.line + 1
                check(
                    name not in lines,
                    f"config {path}: {name!r} is in line {lines.get(name)} and in line {line}; keep one",
                )
                lines[name] = line
            waiting.append(value)


def _over(under: Any, above: Any) -> Any:
    """Mappings joined key by key; of anything else, what stands above."""
    if not (isinstance(under, dict) and isinstance(above, dict)):
        return above
    return under | {key: _over(under.get(key), value) for key, value in above.items()}
