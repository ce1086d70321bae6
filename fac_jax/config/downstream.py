"""`finetune`, `study` and `steer`: what samples are good for."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Literal

from fac_jax.config.checks import check

Matrix = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685)."""

    rank: int = 8
    """Rank of what is added to each matrix (paper: 8 for toxicity and instructions, 16 for rewards)."""
    alpha: float = 16.0
    """What is added is scaled by alpha / rank (paper: 16; 32 for rewards)."""
    dropout: float = 0.1
    """Share of the adapters' inputs that is dropped in training (paper: 0.1)."""
    matrices: tuple[Matrix, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Matrices that are adapted (paper: all seven)."""

    def __post_init__(self) -> None:
        check(self.rank >= 1, f"lora.rank is {self.rank}; it must be at least 1")
        check(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; it must lie in [0, 1)")
        check(
            bool(self.matrices) and len(set(self.matrices)) == len(self.matrices),
            f"lora.matrices is {list(self.matrices)}; name one or more, none twice",
        )


@dataclass(frozen=True)
class FinetuneConfig:
    """Does it help? A classifier, a reward or an instruction model, by the task: seed against seed + synthetic."""

    train: str | None = None
    """Data set of the seed's preference pairs (reward), or instructions with answers: RewardBench's, HH-RLHF's, TRL's,
    AlpacaEval's or Alpaca's rows, or fields named below. Its max_tokens keep the end of a pair's texts (paper: 1,024),
    or the start of instruction and answer. None: of such a task nothing is trained."""
    heldout: str = "heldout"
    """Data set that is never trained on: labelled documents; or pairs (paper: RewardBench), or instructions with
    answers."""
    prompt: str | None = None
    """Pairs, instructions: field with what is answered, as text or as messages, where rows are in no published format.
    None: rows with `answer` are answers to nothing."""
    answer: str | None = None
    """Pairs, instructions: field with the answer, of a pair the better one, where rows are in no published format."""
    rejected: str | None = None
    """Pairs: field with the worse answer."""
    outputs_for: str | None = None
    """Data set of instructions that each arm answers, into model_outputs.json as AlpacaEval reads it; with llm.url the
    local pairwise judge compares them (paper: AlpacaEval's 805)."""
    output_tokens: int = 256
    """Tokens of such an answer at most."""
    method: Literal["head", "lora"] = "head"
    """head: a linear head on residuals of a backbone that stays as it is (seconds): the mean of the content tokens, of
    an answer its last token behind the final norm. lora: adapters in the backbone, and a head on the last token but for
    instructions, which have none. Paper, lora: classifier 3 epochs, rate 5e-5, batch 16; reward 1, 8e-5, 8;
    instructions 5, 1e-4, 16."""
    seeds: tuple[int, ...] = (42, 43, 44)
    """Seeds (paper: 42, 43, 44)."""
    epochs: int = 15
    """Passes over the training set (paper, head only: classifier 15, reward 5)."""
    learning_rate: float = 8e-5
    """Adam's rate (paper, head only: 8e-5)."""
    batch: int = 4
    """Samples in a step (paper, head only: 4)."""
    lora: LoraConfig = LoraConfig()
    """Adapters of the backbone's matrices."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """LoRA: after warm-up constant, or falling to 0 at the last step (paper: cosine for rewards)."""
    warmup: float = 0.0
    """LoRA: share of the steps over which the rate rises linearly from 0 (paper: 0.1 for rewards)."""
    weight_decay: float = 0.0
    """LoRA: AdamW's, of adapters and head (paper: 0.01 for rewards)."""
    gradient_clip: float = 1.0
    """LoRA: norm that a step's gradient is cut to, as transformers' trainer does."""
    checkpoint_every: int = 100
    """LoRA: steps between checkpoints."""

    def __post_init__(self) -> None:
        check(
            self.answer is not None or self.rejected is None,
            f"finetune.rejected is {self.rejected!r} without finetune.answer: name the better one too",
        )
        check(self.output_tokens >= 1, f"finetune.output_tokens is {self.output_tokens}; it must be at least 1")


StudyArm = Literal[
    "random generations",
    "random features",
    "one step",
    "two steps",
    "selection",
    "self-instruct",
    "evol-instruct",
]


@dataclass(frozen=True)
class StudyConfig:
    """Does coverage help? Ways to add samples to the seed, by what a classifier trained on them detects."""

    budgets: tuple[int, ...] = ()
    """Samples that each arm adds to the seed, such as 25 50 100 200; none: no study. What is written, and how, is as in
    `synthesize`."""
    arms: tuple[StudyArm, ...] = typing.get_args(StudyArm)
    """What is compared, beside the seed alone. one step and two steps write for what is missing, from the same number
    of tries; random generations are one step's, unfiltered; random features are the paper's control; selection takes
    documents of the anchor; the last two are rivals that look at no feature."""
    seeds: tuple[int, ...] = (42, 43, 44, 45, 46)
    """Each trains once: its initialisation and order, and which samples a budget draws where an arm has no order."""
    pools: int = 1
    """How often all samples are written anew; seeds take the pools in turn."""
    lora_budgets: tuple[int, ...] = ()
    """Budgets at which adapters are trained beside heads: a head takes seconds, adapters minutes on a CPU."""
    lora_seeds: tuple[int, ...] = (42, 43, 44)
    """Seeds with which they are trained."""
    lora_steps: int = 225
    """Steps of adapters, about as many in every cell (whole epochs), so that more documents do not mean more training
    (paper: 3 epochs of 1,200 documents). All else of heads and adapters is as in `finetune`."""
    lora_learning_rate: float = 5e-5
    """AdamW's rate for adapters (paper: 5e-5)."""
    lora_batch: int = 16
    """Samples in a step of adapters (paper: 16)."""

    def __post_init__(self) -> None:
        check(all(budget >= 1 for budget in self.budgets), f"study.budgets is {list(self.budgets)}; each at least 1")
        for name in ("budgets", "arms", "seeds", "lora_budgets", "lora_seeds"):
            values = getattr(self, name)
            check(len(set(values)) == len(values), f"study.{name} is {list(values)}; name none twice")
        check(bool(self.arms and self.seeds), "study.arms and study.seeds may not be empty")
        check(self.pools >= 1, f"study.pools is {self.pools}; it must be at least 1")
        check(
            set(self.lora_budgets) <= {0, *self.budgets} and set(self.lora_seeds) <= set(self.seeds),
            f"study.lora_budgets is {list(self.lora_budgets)} of study.budgets {list(self.budgets)}, study.lora_seeds "
            f"{list(self.lora_seeds)} of study.seeds {list(self.seeds)}; name only what is there",
        )
        for name in ("lora_steps", "lora_batch"):
            check(getattr(self, name) >= 1, f"study.{name} is {getattr(self, name)}; it must be at least 1")
        rate = self.lora_learning_rate
        check(0 < rate < math.inf, f"study.lora_learning_rate is {rate}; it must be above 0 and finite")


@dataclass(frozen=True)
class SteerConfig:
    """Samples with two choices to a steering vector, measured on questions that none of them is made of."""

    heldout: str | None = None
    """File, glob or pkg://PACKAGE/GLOB of the questions: a list or lines of JSON, each with a question and its choices
    (A) and (B) as the model-written evaluations print them. None: nothing is measured."""
    question: str = "question"
    """Field with the question and its choices."""
    matching: str = "answer_matching_behavior"
    """Field with the choice that shows the behaviour, such as (A)."""
    limit: int | None = None
    """Questions at most, chosen by hash of their text."""
    layer: int | None = None
    """Blocks applied before the vector is taken and added; by default backbone.layer (paper: 12 of 32)."""
    multipliers: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    """How much of the vector is added; -1, 0 and 1 must be among them (paper: -1 to 1)."""
    seeds: tuple[int, ...] = (42, 43, 44)
    """Each decides which choice of a sample is (A) when the vector is taken."""
    equal_norm_with: tuple[str, ...] = ()
    """Run directories of other behaviours, kept for the same model: the vector gets the mean norm of all of them, and
    the other arms' vectors too. Empty: each keeps its own (paper: all behaviours of a layer)."""

    def __post_init__(self) -> None:
        check(
            {-1.0, 0.0, 1.0} <= set(self.multipliers),
            f"steer.multipliers is {list(self.multipliers)}; -1, 0 and 1 must be among them",
        )
        check(self.layer is None or self.layer >= 1, f"steer.layer is {self.layer}; it counts blocks applied, from 1")
        check(self.limit is None or self.limit >= 1, f"steer.limit is {self.limit}; it must be at least 1")
        check(bool(self.seeds), "steer.seeds is empty; name one seed at least")
