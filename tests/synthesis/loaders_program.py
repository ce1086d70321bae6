"""What other programs make of exported files. Run with an interpreter that has them (see test_export_loaders.py):

    loaders_program.py ORDER FOLDER ANSWER

reads the export in FOLDER with the loader that ORDER names and writes what came out to ANSWER, as JSON. Each order
imports its program alone, and calls what a user's command would call; what is our own says so.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DISABLE_VERSION_CHECK": "1"}
ROLES = "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}<|end|>{% endfor %}"
TEMPLATE = ROLES + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
SPECIAL = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]


def trl_sft(folder: Path) -> Any:
    """SFTTrainer prepares the data and takes one step."""
    from trl import SFTConfig, SFTTrainer

    tokenizer = bytes_tokenizer()
    config = SFTConfig(**training(folder))
    trainer = SFTTrainer(tiny_model(), args=config, train_dataset=from_folder(folder), processing_class=tokenizer)
    trainer.train()
    return version("trl"), [
        {"whole": tokenizer.decode(row["input_ids"]), "trained_on": trained_on(tokenizer, row["labels"])}
        for row in trainer.train_dataset
    ]


def trl_reward(folder: Path) -> Any:
    """RewardTrainer prepares the data and takes one step."""
    from trl import RewardConfig, RewardTrainer

    tokenizer = bytes_tokenizer()
    config = RewardConfig(**training(folder))
    trainer = RewardTrainer(tiny_scorer(), args=config, train_dataset=from_folder(folder), processing_class=tokenizer)
    trainer.train()
    return version("trl"), [
        {key: tokenizer.decode(row[f"{key}_ids"]) for key in ("chosen", "rejected")} for row in trainer.train_dataset
    ]


def trl_preference(folder: Path) -> Any:
    """DPOTrainer prepares the data and takes one step."""
    from trl import DPOConfig, DPOTrainer

    tokenizer = bytes_tokenizer()
    config, model = DPOConfig(**training(folder)), folder.parent / "model"
    tiny_model().save_pretrained(model)  # a folder, as the reference model is read from it again
    trainer = DPOTrainer(str(model), args=config, train_dataset=from_folder(folder), processing_class=tokenizer)
    trainer.train()
    return version("trl"), [
        {key: tokenizer.decode(row[f"{key}_ids"]) for key in ("prompt", "chosen", "rejected")}
        for row in trainer.train_dataset
    ]


def llama_factory(folder: Path) -> Any:
    """Its arguments parsed, its loader on dataset_info.json, its tokenization under its chatml template."""
    stand_in("torchaudio")  # imported for audio in messages; there is no wheel of it for the torch that is here
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from transformers import AutoTokenizer

    model = folder.parent / "model"
    tiny_model().save_pretrained(model)
    bytes_tokenizer().save_pretrained(model)
    info = json.loads((folder / "dataset_info.json").read_text())
    name = list(info)[-1]
    stage = "rm" if info[name].get("ranking") else "sft"
    asked = {
        "model_name_or_path": str(model), "stage": stage, "do_train": True, "finetuning_type": "full", "dataset": name,
        "dataset_dir": str(folder), "template": "chatml", "cutoff_len": 4096, "report_to": "none", "use_cpu": True,
        "output_dir": str(folder.parent / "saves"), "overwrite_cache": True,
    }  # fmt: skip
    model_args, data_args, training_args, _, _ = get_train_args(asked)
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    data = get_dataset(template, model_args, data_args, training_args, stage, tokenizer)["train_dataset"]
    sides = {"sft": {"": "whole"}, "rm": {"chosen_": "chosen", "rejected_": "rejected"}}[stage]
    rows = []
    for row in data:
        read = {name: tokenizer.decode(row[f"{side}input_ids"]) for side, name in sides.items()}
        trained = {f"{name}_trained_on": trained_on(tokenizer, row[f"{side}labels"]) for side, name in sides.items()}
        rows.append(read | trained)
    return version("llamafactory"), rows


def rewardbench(folder: Path) -> Any:
    """Its loader of custom preference data, as `rewardbench --dataset FILE --load_json` calls it."""
    # Its table of known reward models subclasses ones of transformers 4.51, and is not needed to read data.
    stand_in("rewardbench.models", REWARD_MODEL_CONFIG={}, DPO_MODEL_CONFIG={})
    from rewardbench import load_and_process_dataset

    data = load_and_process_dataset(str(folder / "preferences.jsonl"), json=True, tokenizer=bytes_tokenizer())
    return version("rewardbench"), [{"chosen": row["text_chosen"], "rejected": row["text_rejected"]} for row in data]


def alpaca_eval(folder: Path) -> Any:
    """What `alpaca_eval evaluate --model_outputs FILE` reads outputs with, and the name that it gives the model."""
    from alpaca_eval import utils

    table = utils.load_or_convert_to_dataframe(folder / "model_outputs.json")
    name = utils.get_generator_name(None, table)
    return version("alpaca_eval"), [row | {"model": name} for row in table.to_dict("records")]


def hf(folder: Path) -> Any:
    """The folder as a data set of the hub, and its card as the hub's library reads it."""
    from datasets import load_dataset
    from huggingface_hub import DatasetCard

    data = load_dataset(str(folder))
    matter = DatasetCard.load(folder / "README.md").data.to_dict()
    return version("datasets"), {"splits": list(data), "rows": list(data["train"]), "card": matter}


def official_tsv(folder: Path) -> Any:
    """The two lines that read a TSV in the method's published code (load_tsv in
    training_scripts/toxicity_detection/finetune_with_synthetic_lora.py and ..._head_only.py), in our words."""
    import pandas

    table = pandas.read_csv(folder / "train.tsv", sep="\t", header=None, names=["text", "label"])
    return version("pandas"), [{"text": row.text, "label": int(row.label)} for row in table.itertuples()]


def caa(folder: Path) -> Any:
    """No package ships this loader: what ComparisonDataset in generate_vectors.py of github.com/nrimsky/CAA does with
    the file, in our words. The vector is read at the last token but one, which must be the letter."""
    with open(folder / "generate_dataset.json") as file:  # in the encoding of the machine, as there
        data = json.load(file)
    tokenizer, rows = bytes_tokenizer(), []
    for item in data:
        row = {"question": item["question"]}
        for side in ("answer_matching_behavior", "answer_not_matching_behavior"):
            tokens = tokenizer(item["question"] + " " + item[side])["input_ids"]
            row[side] = tokenizer.decode(tokens[-2])
        rows.append(row)
    return "nrimsky/CAA, in our words", rows


def stand_in(name: str, **attributes: Any) -> None:
    """An empty module of that name, for an import that what is tested does not use."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(attributes)
    sys.modules[name] = module


def trained_on(tokenizer: Any, labels: list[int]) -> str:
    """What the loss is computed on."""
    return tokenizer.decode([token for token in labels if token >= 0])


def from_folder(folder: Path) -> Any:
    """As users load a folder for TRL."""
    from datasets import load_dataset

    return load_dataset(str(folder), split="train")


def training(folder: Path) -> dict[str, Any]:
    """One step on the CPU, without a trace."""
    return {
        "output_dir": str(folder.parent / "trained"), "max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "max_length": 4096, "bf16": False, "disable_tqdm": True,
    }  # fmt: skip


def bytes_tokenizer() -> Any:
    """One token a byte, so that what comes back is what went in, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[1], chat_template=TEMPLATE,
        additional_special_tokens=SPECIAL[2:], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tiny_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8192, pad_token_id=257, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip


def tiny_model() -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(tiny_config())


def tiny_scorer() -> Any:
    from transformers import LlamaForSequenceClassification

    config = tiny_config()
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


if __name__ == "__main__":
    order, source, answer = sys.argv[1:]
    loader, read = globals()[order](Path(source))
    Path(answer).write_text(json.dumps({"loader": loader, "read": read}), encoding="utf-8")
