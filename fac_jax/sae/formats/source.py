"""Where an SAE comes from: its place and its form, recognised; SAEs of other programs read into ours.

    FOLDER with config.json              fac: our own (`checkpoint.py`)
    FOLDER with cfg.json                 sae_lens: SAELens's (`sae_lens.py`)
    FILE.pth                             official: the paper's published checkpoints (`official.py`)
    OWNER/NAME or OWNER/NAME/PATH        any of them in a repository of the Hugging Face hub, downloaded once into the
                                         hub's cache; PATH is a folder in it, or a .pth file

A path that exists is never taken for a hub id.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fac_jax.errors import UserError, first_line
from fac_jax.runs import file_digest
from fac_jax.sae.formats.official import read_official
from fac_jax.sae.formats.sae_lens import CONFIG, SCALER, WEIGHTS, read_sae_lens

UNNAMED = "a model that it does not name"
"""In place of the backbone's name, for an SAE that says nothing of it."""
OURS = ("config.json", "sae.safetensors")
FORMS = "an SAE folder of fac_jax (config.json) or of SAELens (cfg.json), or a .pth file of the published code"
HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<inside>[^/].*))?")


class Source(NamedTuple):
    """An SAE on this machine."""

    form: Literal["fac", "sae_lens", "official"]
    path: Path


class Foreign(NamedTuple):
    """An SAE of another program, in our terms."""

    arrays: dict[str, np.ndarray]
    """By attribute of `SAE`, float32, on the host."""
    card: dict[str, Any]
    """Fields of `SaeCard` that the arrays do not give."""


def locate(source: str | Path) -> Source:
    """The SAE at a path or in a hub repository, which is downloaded first.

    Raises UserError when there is nothing, it is no SAE, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in (".pth", ".pt"):
            raise UserError(f"{source} is no SAE; give {FORMS}")
        return Source("official", path)
    if path.is_dir():
        if (path / CONFIG).is_file():
            return Source("sae_lens", path)
        return Source("fac", path)
    hub_id = HUB_ID.fullmatch(str(source))
    if hub_id is None:
        raise UserError(f"no SAE in {source}: nothing is there; give {FORMS}, or the hub id of one")
    return locate(_download(hub_id["repository"], (hub_id["inside"] or "").strip("/")))


def read_foreign(source: str | Path, k: int | None = None) -> Foreign:
    """Read an SAE of another program; `k` replaces the K of a Top-K SAE.

    Raises UserError when it cannot be read exactly, and for a `k` that does not fit it.
    """
    found = locate(source)
    assert found.form != "fac", "our own SAEs are read by checkpoint.load_sae"
    read = read_official if found.form == "official" else read_sae_lens
    arrays, card = read(found.path, k)
    for name, array in arrays.items():
        bad = np.isnan(array) if name == "threshold_f" else ~np.isfinite(array)  # infinite: a feature that is off
        if bad.any():
            raise UserError(f"{source}: {int(bad.sum()):,} of the numbers of {name} are not finite; it cannot be used")
    check_k(source, k, card["k"], len(arrays["b_enc_f"]))
    card["model"] = card["model"] or UNNAMED
    return Foreign(arrays, {**card, "model_digest": None, "rows": 0, "steps": 0, "metrics": {}})


def check_k(source: str | Path, wanted: int | None, found: int | None, features: int) -> None:
    """Raise UserError where K is wanted of an SAE with thresholds, or is more than its features."""
    if wanted is not None and found is None:
        raise UserError(f"{source} has a threshold for each feature and no K: leave out --k {wanted}")
    if found is not None and not 1 <= found <= features:
        raise UserError(f"{source} has {features} features and K {found}; K must lie between 1 and {features}")


def files_of(source: str | Path) -> list[Path]:
    """The files that make the SAE, those that exist. Of ours the card is enough: it holds its tensors' digests."""
    form, path = locate(source)
    if form == "official":
        return [path]
    names = OURS[:1] if form == "fac" else (CONFIG, SCALER, WEIGHTS)
    return [path / name for name in names if (path / name).is_file()]


def fingerprints(source: str | Path) -> list[str]:
    """Digests of all bytes that make the SAE: another content is another SAE, wherever it lies."""
    found = []
    for file in files_of(source):
        state = file.stat()
        found.append(f"{file.name}:{_digest(file, state.st_size, state.st_mtime_ns)}")
    if not found:
        raise UserError(f"no SAE in {source}: config.json is missing; give {FORMS}")
    return found


@functools.lru_cache(maxsize=64)
def _digest(path: Path, size: int, modified_ns: int) -> str:
    """A run asks for it once a stage, and weights have gigabytes."""
    return file_digest(path)


@functools.lru_cache(maxsize=64)
def _download(repository: str, inside: str) -> Path:
    """Local path of a folder or .pth file of a hub repository; once a process, so that all files are of one commit."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    where = f"{repository}/{inside}" if inside else repository
    below = f"{inside}/" if inside else ""
    try:
        if inside.endswith((".pth", ".pt")):
            return Path(hf_hub_download(repository, inside))
        wanted = [below + name for name in (*OURS, CONFIG, SCALER, WEIGHTS)]
        folder = Path(snapshot_download(repository, allow_patterns=wanted)) / inside
        if (folder / OURS[0]).is_file() or (folder / CONFIG).is_file():
            return folder
        try:
            names = HfApi().list_repo_files(repository)
        except (OSError, HfHubHTTPError):  # without a network: what the cache holds
            names = [f"{below}{path.name}" for path in folder.glob("*.pth")]
        return Path(hf_hub_download(repository, _only_checkpoint(where, below, names)))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"no SAE in {where}: it is no path here and not in the hub's cache, and the hub cannot be reached "
            f"({first_line(error)}); download it where there is a network and give its folder or file"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"no SAE in {where}: it is no path here, and the hub gave {type(error).__name__} ({first_line(error)}); "
            "check the name, and for a gated repository accept its licence and set HF_TOKEN"
        ) from None


def _only_checkpoint(where: str, below: str, names: Iterable[str]) -> str:
    found = sorted(name for name in names if name.startswith(below) and name.endswith(".pth"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{where} holds {len(found)} checkpoints; add one to the id: {', '.join(found)}")
    folders = sorted({name.rpartition("/")[0] for name in names if name.endswith((f"/{CONFIG}", f"/{OURS[0]}"))})
    more = f"; it holds SAEs in {', '.join(folders[:5])}{', ...' if len(folders) > 5 else ''}" if folders else ""
    raise UserError(f"no SAE in {where}: the repository holds none there{more}; add the folder or file to the hub id")
