"""Arrays and small files below one folder or URL: whole, checksummed, and never zeros for what is missing.

An array is written at once, as one file (zarr3, sharding_indexed) of blocks of `BLOCK_ROWS` rows that can be read
alone, each with a CRC-32C. tensorstore reports every failure as a ValueError `CODE: text`; here it becomes a UserError
that says what it was about and what to do.

The only module that uses tensorstore. It must not be used before a fork: tensorstore aborts the child.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tensorstore as ts

from fac_jax.activations.manifest import seal, unseal
from fac_jax.errors import UserError

T = TypeVar("T")

BLOCK_ROWS = 128  # 1 MiB at width 4,096; single rows are 80 times slower to read
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


def open_root(path: str | Path, cache_bytes: int = 0) -> Root:
    """A local folder, or a URL such as gs://bucket/folder or s3://bucket/folder; nothing is read yet."""
    url = str(path) if "://" in str(path) else Path(path).absolute().as_uri()
    context = ts.Context(
        {
            "cache_pool": {"total_bytes_limit": cache_bytes},
            "gcs_request_retries": RETRIES,
            "s3_request_retries": RETRIES,
        }
    )
    with storage(f"store at {path}", "mend the path"):
        return Root(str(path), ts.KvStore.open(url.rstrip("/") + "/", context=context).result(), context)


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


def write_arrays(root: Root, values: dict[str, np.ndarray]) -> None:
    """Write [rows, width] arrays at the paths that are the keys; what a killed writer left there is replaced."""
    writes = {}
    for path, value in values.items():
        padded = np.zeros((_padded(len(value)), value.shape[1]), value.dtype)
        padded[: len(value)] = value
        with storage(f"{root.url}/{path}"):
            spec = _spec(padded.shape, value.dtype.name)
            kvstore = root.kv / f"{path}/"
            array = ts.open(spec, kvstore=kvstore, context=root.context, create=True, delete_existing=True).result()
            writes[path] = array.write(padded)
    for path, write in writes.items():
        with storage(f"{root.url}/{path}"):
            write.result()


def open_array(root: Root, path: str, rows: int, width: int, dtype: str) -> ts.TensorStore:
    """The array at `path`. Makes no request, because the shape is known: the first read shows what is wrong."""
    spec = _spec((_padded(rows), width), dtype) | {"assume_metadata": True, "recheck_cached_data": "open"}
    return ts.open(spec, kvstore=root.kv / f"{path}/", context=root.context).result()


def begin_read(array: ts.TensorStore, start: int, stop: int, into: np.ndarray) -> ts.WriteFutures:
    """Begin to read rows [start, stop) into `into`, without a copy between."""
    return ts.array(into).write(array[start:stop])


def _padded(rows: int) -> int:
    return -(-rows // BLOCK_ROWS) * BLOCK_ROWS


def _spec(shape: tuple[int, int], dtype: str) -> dict[str, Any]:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    checked = [little, {"name": "crc32c"}]
    shard = {"chunk_shape": [BLOCK_ROWS, shape[1]], "codecs": checked, "index_codecs": checked}
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
