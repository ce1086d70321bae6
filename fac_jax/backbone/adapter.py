"""A LoRA adapter in peft's files, read to be added to a model's tensors: W becomes W + (alpha / r) B A.

Reads `adapter_config.json` and `adapter_model.safetensors`, ours (`fac finetune`) or peft's. Writes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fac_jax.errors import UserError

PREFIX = "base_model.model."
UNREAD = {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
"""Settings of peft that change what an adapter means; only with these values is one read."""


class Adapter:
    """Low-rank additions by the name of the tensor that they are added to."""

    def __init__(self, folder: str | Path) -> None:
        """Raises UserError for files that are missing or unreadable, and for another kind of adapter."""
        self.where = Path(folder)
        try:
            config = json.loads((self.where / "adapter_config.json").read_text(encoding="utf-8"))
            tensors = load_file(self.where / "adapter_model.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{folder} is no readable adapter ({error}); name a folder with adapter_config.json and "
                "adapter_model.safetensors, such as finetune/arms/seed+kept/seed-42 of a run"
            ) from None
        if config.get("peft_type") != "LORA":
            raise UserError(f"{folder} is an adapter of type {config.get('peft_type')!r}; only LORA is read")
        for name, value in UNREAD.items():
            if config.get(name, value) not in (value, None):
                raise UserError(f"{folder} has {name} {config[name]!r}, which is not read; merge it with peft itself")
        self._scale = config["lora_alpha"] / config["r"]
        self._sides: dict[str, dict[str, np.ndarray]] = {}
        for name, value in tensors.items():
            module, _, side = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            if side not in ("lora_A", "lora_B"):
                raise UserError(f"{folder} holds {name}, which is no part of a LoRA; merge it with peft itself")
            self._sides.setdefault(f"{module}.weight", {})[side] = value

    def names(self) -> set[str]:
        """Tensors of the model that it changes."""
        return set(self._sides)

    def added_to(self, name: str, weight: np.ndarray) -> np.ndarray:
        """The tensor with what is added to it, float32 [out, in]; as it is where nothing is added."""
        if name not in self._sides:
            return weight
        sides = self._sides[name]
        product = sides["lora_B"].astype(np.float32) @ sides["lora_A"].astype(np.float32)
        if product.shape != weight.shape:
            raise UserError(
                f"{self.where} adds {list(product.shape)} to {name}, which has shape {list(weight.shape)}: it is an "
                "adapter of another model"
            )
        return weight.astype(np.float32) + np.float32(self._scale) * product
