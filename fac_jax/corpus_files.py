"""Where a corpus lies, and how its files are opened: local paths, installed packages, buckets and the hub.

    PATH, GLOB                              this machine
    pkg://PACKAGE/GLOB                      inside an installed package, which is located and never imported
    s3://BUCKET/GLOB, gs://BUCKET/GLOB      object stores, by pyarrow
    hf://datasets/OWNER/NAME[@REVISION][/GLOB]   data sets on the model hub, by huggingface_hub; without GLOB their
                                            parquet and jsonl files

Globs know *, ?, [abc] and **, and mean the same everywhere. Nothing is downloaded: files are read in ranges.

Servers and credentials come from the environment, as for the activation store:
- s3: AWS_ENDPOINT_URL (another server than Amazon's), AWS_REGION or AWS_DEFAULT_REGION (by default the bucket's own),
  and Amazon's usual credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, the machine's role); where
  there are none, requests are anonymous.
- gs: TENSORSTORE_GCS_HTTP_URL, or else STORAGE_EMULATOR_HOST (another server than Google's, which is asked
  anonymously unless GOOGLE_APPLICATION_CREDENTIALS is set), and Google's usual credentials
  (GOOGLE_APPLICATION_CREDENTIALS, gcloud's, the machine's account); CLOUDSDK_AUTH_DISABLE_CREDENTIALS=true asks
  anonymously.
- hf: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from fac_jax.errors import UserError
from fac_jax.remote_file import CONTACT_S, Changed, RemoteFile, patiently, refused
from fac_jax.runs import fingerprint

T = TypeVar("T")

LISTING_S = 300.0
"""Seconds for a server that answers to list what a glob asks for; a million objects take a thousand requests."""
HUB_ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
HUB_URL = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.*))?")
REQUESTS_AT_ONCE = 16


@dataclass(frozen=True)
class CorpusFile(ABC):
    """A file that is there."""

    name: str
    """Its last part, which messages about rows show."""
    size: int
    """Bytes."""

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits that change when its content does."""

    @abstractmethod
    def open(self) -> pa.NativeFile:
        """Its bytes, to read in any order; a file on a server is read in ranges as large as those that are asked for.

        Raises UserError, also while it is read, when the file is gone or another, or its server does not answer.
        """


@dataclass(frozen=True)
class LocalFile(CorpusFile):
    """A file on this machine."""

    path: Path

    def fingerprint(self) -> str:
        return fingerprint(self.path)

    def open(self) -> pa.NativeFile:
        return pa.OSFile(str(self.path))


@dataclass(frozen=True)
class BucketFile(CorpusFile):
    """An object; `key` is BUCKET/PATH."""

    url: str
    key: str
    filesystem: pafs.FileSystem

    def fingerprint(self) -> str:
        return _digest(*_ask(self.url, lambda: _state(self.filesystem, self.key)))

    def open(self) -> pa.NativeFile:
        # The first use of a handle of Google's begins to download the object, and pyarrow keeps all other threads
        # from running meanwhile: so it is only opened where the server has just answered.
        opened = _ask(self.url, lambda: _state(self.filesystem, self.key))
        handle = _ask(self.url, lambda: self.filesystem.open_input_file(self.key))

        def check() -> None:
            # Reads of S3 cannot be tied to a version by pyarrow; those of Google's are, but not by its emulators.
            if _state(self.filesystem, self.key) != opened:
                raise Changed

        return pa.PythonFile(RemoteFile(self.url, opened[0], lambda at, n: handle.read_at(n, at), check), mode="r")


@dataclass(frozen=True)
class HubFile(CorpusFile):
    """A file of a data set on the hub, at one commit, so that it cannot change; `blob` is the hash of its content."""

    url: str
    path: str
    blob: str

    def fingerprint(self) -> str:
        return _digest(self.size, self.blob)

    def open(self) -> pa.NativeFile:
        from huggingface_hub import HfFileSystem

        # Its instances are kept for each thread, and threads come and go here.
        filesystem = HfFileSystem(skip_instance_cache=True)
        handle = _ask(self.url, _hub_call(lambda: filesystem.open(self.path, "rb", cache_type="none")))

        def read_at(start: int, count: int) -> bytes:
            handle.seek(start)
            return handle.read(count)

        return pa.PythonFile(RemoteFile(self.url, self.size, _hub_call(read_at), lambda: None), mode="r")


def resolve(path: str) -> list[CorpusFile]:
    """Files that a path, glob or URL means, sorted by their paths. Raises UserError when there are none."""
    scheme, _, _ = path.partition("://")
    if scheme in ("s3", "gs") and "://" in path:
        return _bucket_files(path)
    if scheme == "hf" and "://" in path:
        return _hub_files(path)
    return [LocalFile(file.name, file.stat().st_size, file) for file in local_files(path)]


def fingerprints(path: str) -> list[str]:
    """Fingerprint of each file that `path` means, in order; several are asked for at once."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(lambda file: file.fingerprint(), resolve(path)))


def local_files(path: str) -> list[Path]:
    """Files on this machine meant by a path, a glob, or `pkg://PACKAGE/GLOB`, sorted."""
    pattern = path
    if path.startswith("pkg://"):
        package, _, inside = path.removeprefix("pkg://").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"{path}: the package {package!r} is not installed in this environment; "
                "launch/quickstart.sh installs the quickstart's data packages (launch/quickstart-data.txt), "
                "launch/tasks.sh those of configs/tasks too (launch/tasks-data.txt)"
            )
        pattern = str(Path(next(iter(spec.submodule_search_locations))) / inside)
    elif "://" in path:
        raise UserError(
            f"{path}: cannot be read from there; corpora lie in local paths, pkg://, s3://, gs:// and hf://datasets/, "
            "models in local paths and pkg://"
        )
    found = sorted(Path(name) for name in glob(str(Path(pattern).expanduser()), recursive=True))
    files = [file for file in found if file.is_file()]
    if not files and found:
        raise UserError(f"{path}: {found[0]} is a folder; name the files in it, such as {path.rstrip('/')}/*.jsonl")
    if not files:
        raise UserError(f"{path}: no such file; mend the path")
    return files


def matches(path: str, pattern: str) -> bool:
    """Whether `glob(pattern, recursive=True)` would find `path`."""
    return _match(path.split("/"), pattern.split("/"))


def _match(parts: list[str], pattern: list[str]) -> bool:
    if not pattern or not parts:
        return not pattern and not parts
    hidden = parts[0].startswith(".")
    if pattern[0] == "**":
        rest = pattern[1:] or ["*"]  # at the end it finds files at any depth
        return _match(parts, rest) or (not hidden and _match(parts[1:], pattern))
    if hidden and not pattern[0].startswith("."):
        return False
    return fnmatchcase(parts[0], pattern[0]) and _match(parts[1:], pattern[1:])


def _folder(pattern: str) -> tuple[str, bool]:
    """The folder in which everything lies that the pattern can find, and whether also in folders below it."""
    parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(parts[:-1]) if has_magic(part)), len(parts) - 1)
    return "/".join(parts[:fixed]), parts[fixed:] != parts[-1:] or parts[-1] == "**"


def _bucket_files(url: str) -> list[CorpusFile]:
    scheme, _, key = url.partition("://")
    bucket, _, pattern = key.partition("/")
    if not bucket or not pattern or has_magic(bucket):
        raise UserError(f"{url}: needs the form {scheme}://BUCKET/PATH, with globs in PATH only; mend the path")
    filesystem = _ask(url, lambda: _s3(bucket) if scheme == "s3" else _gcs())
    # Asked of globs too: it shows whether there is a server, before the long wait that a listing may take.
    found = [_ask(url, lambda: filesystem.get_file_info(key))]
    if has_magic(pattern):
        folder, below = _folder(pattern)
        asked = pafs.FileSelector(f"{bucket}/{folder}".rstrip("/"), allow_not_found=True, recursive=below)
        found = _ask(url, lambda: filesystem.get_file_info(asked), listing=True)
        found = [info for info in found if matches(info.path.partition("/")[2], pattern)]
    files = [info for info in found if info.type == pafs.FileType.File]
    if not files:
        raise UserError(f"{url}: no such object, or no such bucket; mend the path")
    files.sort(key=lambda info: PurePosixPath(info.path))
    return [BucketFile(i.base_name, i.size, f"{scheme}://{i.path}", i.path, filesystem) for i in files]


def _s3(bucket: str) -> pafs.FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION", os.environ.get("AWS_DEFAULT_REGION"))
    if region is None:
        region = pafs.resolve_s3_region(bucket) if endpoint is None else "us-east-1"
    once = pafs.AwsStandardS3RetryStrategy(max_attempts=1)  # `patiently` tries again
    return pafs.S3FileSystem(
        region=region, endpoint_override=endpoint, connect_timeout=5, request_timeout=10, retry_strategy=once
    )


def _gcs() -> pafs.FileSystem:
    endpoint = os.environ.get("TENSORSTORE_GCS_HTTP_URL") or os.environ.get("STORAGE_EMULATOR_HOST")
    keyed = "GOOGLE_APPLICATION_CREDENTIALS" in os.environ
    anonymous = os.environ.get("CLOUDSDK_AUTH_DISABLE_CREDENTIALS", "").lower() in ("1", "true")
    where: dict[str, Any] = {}
    if endpoint:
        address = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        where = {"endpoint_override": address.netloc, "scheme": address.scheme}
    return pafs.GcsFileSystem(
        anonymous=anonymous or bool(endpoint and not keyed), retry_time_limit=timedelta(seconds=2), **where
    )


def _hub_files(url: str) -> list[CorpusFile]:
    from huggingface_hub import HfApi

    parsed = HUB_URL.fullmatch(url)
    if parsed is None:
        raise UserError(f"{url}: needs the form hf://datasets/OWNER/NAME[@REVISION][/GLOB]; mend the path")
    repo, revision, pattern = parsed[1], unquote(parsed[2]) if parsed[2] else None, parsed[3]
    api = HfApi()
    commit = _ask(url, _hub_call(lambda: api.dataset_info(repo, revision=revision, timeout=CONTACT_S).sha))
    folder, below = _folder(pattern or "**")

    def listing() -> list[Any]:
        return list(api.list_repo_tree(repo, folder or None, recursive=below, revision=commit, repo_type="dataset"))

    entries = _ask(url, _hub_call(listing), listing=True)
    found = [entry for entry in entries if hasattr(entry, "blob_id") and _wanted(entry.path, pattern)]
    if not found:
        what = "no such file" if pattern else f"has no {', '.join(HUB_ENDINGS)} file"
        raise UserError(f"{url}: {what}; mend the path")
    found.sort(key=lambda entry: PurePosixPath(entry.path))
    return [_hub_file(repo, commit, entry) for entry in found]


def _wanted(path: str, pattern: str | None) -> bool:
    return matches(path, pattern) if pattern else path.endswith(HUB_ENDINGS) and matches(path, "**")


def _hub_file(repo: str, commit: str, entry: Any) -> HubFile:
    path = f"datasets/{repo}@{commit}/{entry.path}"
    blob = entry.lfs.sha256 if entry.lfs else entry.blob_id
    return HubFile(PurePosixPath(entry.path).name, entry.size, f"hf://datasets/{repo}/{entry.path}", path, blob)


def _hub_call(call: Callable[..., T]) -> Callable[..., T]:
    """`call`, whose failures are all OSErrors: those of the hub's HTTP client are not."""
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, OfflineModeIsEnabled

    def called(*arguments: Any) -> T:
        try:
            return call(*arguments)
        except EntryNotFoundError:
            raise FileNotFoundError from None
        except OfflineModeIsEnabled:
            raise UserError(
                "hf://datasets/ cannot be read while HF_HUB_OFFLINE is set; unset it, or copy the files to a folder"
            ) from None
        except (HTTPError, HFValidationError) as error:
            raise OSError(f"{type(error).__name__}: {error}") from None

    return called


def _ask(url: str, call: Callable[[], T], listing: bool = False) -> T:
    """What a server answers, or a UserError about `url`."""
    try:
        return patiently(call, LISTING_S if listing else CONTACT_S)
    except FileNotFoundError:
        raise UserError(f"{url}: no such file; mend the path") from None
    except OSError as error:
        if "NO_SUCH_BUCKET" in str(error):
            raise UserError(f"{url}: no such object, or no such bucket; mend the path") from None
        raise refused(url, error) from None


def _state(filesystem: pafs.FileSystem, key: str) -> tuple[int, str]:
    """Bytes of an object, and what changes when it does: Amazon's ETag, or the time of writing."""
    if isinstance(filesystem, pafs.S3FileSystem):
        metadata = filesystem.open_input_file(key).metadata()
        tag = metadata.get("ETag") or metadata["Last-Modified"]  # some servers of Amazon's protocol give no ETag
        return int(metadata["Content-Length"]), tag.decode()
    info = filesystem.get_file_info(key)
    if info.type != pafs.FileType.File:
        raise FileNotFoundError(key)
    return info.size, str(info.mtime_ns)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()[:16]
