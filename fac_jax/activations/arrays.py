"""Arrays and small files below one folder or URL: whole, checksummed, and never zeros for what is missing.

An array is written at once, as one file (zarr3, sharding_indexed) of blocks of rows that can be read alone, each with a
CRC-32C. tensorstore reports every failure as a ValueError `CODE: text`; here it becomes a UserError
that says what it was about and what to do.

The only module that uses tensorstore. It must not be used before a fork: tensorstore aborts the child.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import tensorstore as ts

from fac_jax.activations.manifest import Form, seal, unseal
from fac_jax.errors import UserError

T = TypeVar("T")

CACHE_BYTES = 32 * 2**20  # for shard indices: without it every block costs a reader a second request
# With the default of 32 retries, 32 s apart, a dead endpoint looks like a hang.
RETRIES = {"max_retries": 6, "max_delay": "8s"}
AGAIN = "mend that, then run the same command again"


@dataclass(frozen=True)
class Root:
    """A folder or URL that is open; `context` holds the cache its arrays share."""

    url: str
    kv: ts.KvStore
    context: ts.Context

    @property
    def folder(self) -> Path | None:
        """The local folder that it is, or None."""
        return None if "://" in self.url and not self.url.startswith("file://") else _local(self.url)


def open_root(path: str | Path, cache_bytes: int = 0) -> Root:
    """A local folder, or a URL such as gs://bucket/folder or s3://bucket/folder; nothing is read yet."""
    context = ts.Context(
        {
            "cache_pool": {"total_bytes_limit": cache_bytes},
            "gcs_request_retries": RETRIES,
            "s3_request_retries": RETRIES,
        }
    )
    with storage(f"store at {path}", "mend the path"):
        return Root(str(path), ts.KvStore.open(_kvstore(str(path)), context=context).result(), context)


def _kvstore(path: str) -> str | dict[str, Any]:
    """The folder or URL as tensorstore wants it. AWS_ENDPOINT_URL names another S3 server than Amazon's, as it does for
    Amazon's own tools (TENSORSTORE_GCS_HTTP_URL is tensorstore's own for Google's)."""
    if "://" not in path:
        return Path(path).absolute().as_uri() + "/"
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if not path.startswith("s3://") or endpoint is None:
        return path.rstrip("/") + "/"
    bucket, _, inside = path.removeprefix("s3://").strip("/").partition("/")
    region = os.environ.get("AWS_REGION", os.environ.get("AWS_DEFAULT_REGION", "us-east-1"))
    where = {"bucket": bucket, "path": f"{inside}/" if inside else ""}
    keys: dict[str, Any] = {"aws_credentials": {"type": "environment"}} if "AWS_ACCESS_KEY_ID" in os.environ else {}
    return {"driver": "s3", **where, **keys, "endpoint": endpoint, "aws_region": region}


def _local(path: str) -> Path:
    return Path(url2pathname(urlsplit(path).path)) if path.startswith("file://") else Path(path)


@contextmanager
def storage(what: str, remedy: str = AGAIN) -> Iterator[None]:
    """Give tensorstore's errors a subject and a next action."""
    try:
        yield
    except ValueError as error:
        reason = str(error).partition(" [tensorstore_spec")[0]
        if "No space left" in reason:
            raise UserError(
                f"no space left for {what}: free some, then run the same command again; "
                "committed shards are kept and it goes on after them"
            ) from None
        raise UserError(f"{what} cannot be used ({reason}): {remedy}") from None


def read_json(root: Root, key: str, kind: type[T]) -> T | None:
    """A dataclass written by `write_json`, or None. Raises UserError when it is damaged or of a newer version."""
    where = f"{root.url}/{key}"
    with storage(where):
        found = root.kv.read(key).result()
    return None if found.state == "missing" else unseal(kind, found.value, where)


def write_json(root: Root, key: str, value: Any) -> None:
    """One atomic write of a dataclass."""
    with storage(f"{root.url}/{key}"):
        root.kv.write(key, seal(value)).result()


def remove(root: Root, key: str) -> None:
    """Delete one file, if it is there."""
    with storage(f"{root.url}/{key}"):
        root.kv.write(key, None).result()


def write_arrays(root: Root, values: dict[str, np.ndarray], form: Form) -> None:
    """Write [rows, width] arrays at the paths that are the keys; what a killed writer left there is overwritten.

    The two files of each have known names, so nothing is listed or deleted: object stores list slowly, and not always
    what is there.
    """
    writes: list[tuple[str, Any]] = []
    for path, value in values.items():
        rows, width = value.shape
        padded = value  # of a shard's rows there are whole blocks already: one copy less of the largest array
        if rows != form.padded(rows):
            padded = np.zeros((form.padded(rows), width), value.dtype)
            padded[:rows] = value
        array = open_array(root, path, rows, width, value.dtype.name, form)
        described = json.dumps({"zarr_format": 3, "node_type": "array", **_metadata(array)}).encode()
        writes += [(path, root.kv.write(f"{path}/zarr.json", described)), (path, array.write(padded))]
    for path, write in writes:
        with storage(f"{root.url}/{path}"):
            write.result()


def array_keys(path: str) -> tuple[str, str]:
    """The files of the array at `path`."""
    return f"{path}/zarr.json", f"{path}/c/0/0"


def _metadata(array: ts.TensorStore) -> dict[str, Any]:
    """What `zarr.json` says, so that any zarr library can read the array."""
    return array.spec().to_json()["metadata"]


def open_array(root: Root, path: str, rows: int, width: int, dtype: str, form: Form) -> ts.TensorStore:
    """The array at `path`. Makes no request, because the shape is known: the first read shows what is wrong."""
    spec = _spec((form.padded(rows), width), dtype, form) | {"assume_metadata": True, "recheck_cached_data": "open"}
    return ts.open(spec, kvstore=root.kv / f"{path}/", context=root.context).result()


def begin_read(array: ts.TensorStore, start: int, stop: int, into: np.ndarray) -> ts.WriteFutures:
    """Begin to read rows [start, stop) into `into`, without a copy between."""
    return ts.array(into).write(array[start:stop])


def _spec(shape: tuple[int, int], dtype: str, form: Form) -> dict[str, Any]:
    little, check = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
    codecs = [little, check] if form.compression == "none" else [little, _bitshuffle(dtype), check]
    shard = {
        "chunk_shape": [form.block_rows, shape[1]],
        "codecs": codecs,
        "index_codecs": [little, check],
        "index_location": "start",  # not every object store answers a request for the last bytes
    }
    return {
        "driver": "zarr3",
        "metadata": {
            "shape": shape,
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
            "codecs": [{"name": "sharding_indexed", "configuration": shard}],
            "fill_value": 0,
        },
        # Without these two a block that was never written, or a deleted file, reads as zeros.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }


def _bitshuffle(dtype: str) -> dict[str, Any]:
    """Bits of equal weight side by side, then zstd: exponents of a residual are alike, mantissas are noise."""
    size = np.dtype("uint16" if dtype == "bfloat16" else dtype).itemsize
    settings = {"cname": "zstd", "clevel": 1, "shuffle": "bitshuffle", "typesize": size, "blocksize": 0}
    return {"name": "blosc", "configuration": settings}
