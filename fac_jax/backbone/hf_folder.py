"""Safetensors of a Hugging Face folder or hub repository, opened file by file and read slice by slice.

Reads `model.safetensors`, or the files that `model.safetensors.index.json` names; from the hub, a file is downloaded
when its first tensor is asked for. Writes nothing but the hub's own cache.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fac_jax.errors import UserError, first_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
Fetch = Callable[[str], Path | None]
"""File name -> local path, None when the model has no such file."""


def local_fetch(folder: Path) -> Fetch:
    """Files of a local folder."""
    return lambda name: folder / name if (folder / name).is_file() else None


def hub_fetch(source: str, setting: str = "backbone.model") -> Fetch:
    """Files of a hub repository, downloaded when first asked for: shards above the layer are never fetched.

    `setting` is the one that names the repository, for errors."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(source, name))
        except LocalEntryNotFoundError as error:  # an EntryNotFoundError too, but means: the hub was not reached
            raise UserError(
                f"{source}: not in the local cache, and the hub cannot be reached ({first_line(error)}); download the "
                f"model where there is a network and set {setting} to its folder"
            ) from None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise UserError(
                f"{source}: the hub gave {type(error).__name__} ({first_line(error)}); check the name, and for "
                "a gated model accept its licence and set HF_TOKEN"
            ) from None

    return fetch


class SafetensorsFiles:
    """Tensors of a Hugging Face model: `model.safetensors`, or the files its index names."""

    def __init__(self, where: str, fetch: Fetch) -> None:
        self.where = where
        self._fetch = fetch
        self._open_files: dict[str, Any] = {}
        index = fetch(INDEX)
        if index is not None:
            self._index_text = index.read_text(encoding="utf-8")
            self._file_of: dict[str, str] = json.loads(self._index_text)["weight_map"]
        elif fetch(SINGLE) is not None:
            self._index_text = ""
            self._file_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise UserError(f"{where}: has neither {SINGLE} nor {INDEX}; only safetensors weights are read")

    def names(self) -> set[str]:
        """Names of all tensors, in every file."""
        return set(self._file_of)

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shapes from the files' headers."""
        found = (name for name in names if name in self._file_of)
        return {name: tuple(self._open(self._file_of[name]).get_slice(name).get_shape()) for name in found}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """One slice; other bytes of the file are not touched."""
        return self._open(self._file_of[name]).get_slice(name)[index]

    def digest(self) -> str:
        """The index, and the size and sampled bytes of the file with the embedding, which every load reads."""
        path = self._fetch(self._file_of["model.embed_tokens.weight"])
        assert path is not None
        return hashlib.sha256((self._index_text + sampled_digest(path)).encode()).hexdigest()

    def _open(self, file: str) -> Any:
        if file not in self._open_files:
            path = self._fetch(file)
            if path is None:
                raise UserError(f"{self.where}: {file} is named by {INDEX} but not there; download the model again")
            try:
                self._open_files[file] = safe_open(path, framework="numpy")
            except SafetensorError as error:
                raise UserError(f"{path}: not a readable safetensors file ({error}); download it again") from None
        return self._open_files[file]


def sampled_digest(path: Path, samples: int = 16, bytes_per_sample: int = 65_536) -> str:
    """SHA-256 of a file's size and of evenly spaced pieces of it: cheap, and two fine-tunes of one model differ."""
    size = path.stat().st_size
    state = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for i in range(samples):
            stream.seek(max(0, size - bytes_per_sample) * i // max(1, samples - 1))
            state.update(stream.read(bytes_per_sample))
    return state.hexdigest()
