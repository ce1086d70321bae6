"""The same store in S3 and GCS, by real servers on loopback: the same rows, damage, claims, kills and few requests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from fac_jax.activations import arrays, claim
from fac_jax.activations.arrays import open_root
from fac_jax.activations.manifest import SPLITS
from fac_jax.activations.reader import StoreReader
from fac_jax.activations.store import create_store
from fac_jax.activations.stream import batch_function
from fac_jax.activations.upkeep import drop, info, merge, verify
from fac_jax.activations.writer import StoreWriter
from fac_jax.errors import UserError
from tests.activations.object_store import Server, gcs_server, s3_server
from tests.activations.tiny_store import fill, manifest


@pytest.fixture(scope="module", params=["s3", "gcs"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    start = s3_server if request.param == "s3" else gcs_server
    with start(tmp_path_factory.mktemp(request.param)) as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    """A folder of the test's own in the bucket."""
    return f"{server.url}/{request.node.originalname}"


def same_rows(one: str | Path, other: str | Path) -> bool:
    for split in SPLITS:
        a, b = (StoreReader(path, split) for path in (one, other))
        left, right = a.read_blocks(range(len(a.block_rows))), b.read_blocks(range(len(b.block_rows)))
        if not all(np.array_equal(getattr(left, n), getattr(right, n)) for n in ("resid", "doc", "position", "token")):
            return False
    return True


def test_the_rows_are_those_of_a_local_store(url: str, store: Path, server: Server) -> None:
    fill(url, manifest(), batches=8, rows=250)
    assert same_rows(url, store)
    assert verify(url) == [] and "1,500 rows" in "\n".join(info(url))
    batch = batch_function(StoreReader(url), 100, seed=3, streams=2)
    assert np.array_equal(batch(7).token, batch_function(StoreReader(store), 100, seed=3, streams=2)(7).token)


def test_a_block_costs_one_request(url: str, server: Server) -> None:
    fill(url, manifest(shard_rows=2000), batches=8, rows=250)
    reader = StoreReader(url)
    key, blocks = "train/resid/c/0/0", len(reader.block_rows)
    assert blocks == 12
    before = server.requests("GET", f"{url[-20:]}/arrays/p0000/000000/{key}")
    for block in range(blocks):
        reader.read_blocks([block])
    time.sleep(0.2)  # the log is written after the answer
    made = server.requests("GET", f"{url[-20:]}/arrays/p0000/000000/{key}") - before
    assert made == blocks + 1, "one for the index of the shard, and one for each block"


def test_damage_is_named(url: str) -> None:
    fill(url, manifest(), batches=8, rows=250)
    root, key = open_root(url), "arrays/p0000/000001/train/resid/c/0/0"
    data = bytearray(root.kv.read(key).result().value)
    data[-9] ^= 1
    root.kv.write(key, bytes(data)).result()
    (found,) = verify(url)
    assert (found.path, found.blocks) == ("arrays/p0000/000001/train", (2,)) and found.documents
    assert StoreReader(url, on_bad_chunk="skip").left_out > 0
    root.kv.write(key, None).result()
    with pytest.raises(UserError, match=r"shard arrays/p0000/000001/train .* is missing"):
        StoreReader(url, on_bad_chunk="skip").read_blocks([5])


def test_writers_are_dropped_and_stores_merged(url: str, store: Path) -> None:
    described = manifest(writers=2)
    fill(url, described, batches=8, rows=250)
    with pytest.raises(UserError, match="no training rows are left"):
        drop(url, "p0000")
    merge(f"{url}-both", [url, str(other_store(store))])
    assert StoreReader(f"{url}-both").rows == 3000 and verify(f"{url}-both") == []


def other_store(store: Path) -> Path:
    described = manifest(shard_rows=700)
    fill(store.parent / "other", described, batches=8, rows=250)
    return store.parent / "other"


WRITE = """
import sys
from fac_jax.activations import claim
from tests.activations.tiny_store import announce_appends, fill, manifest
claim.LEASE_S, claim.RENEW_S = 1.0, 0.2
announce_appends()
fill(sys.argv[1], manifest(), batches=24, rows=250)
"""


def test_a_killed_writer_goes_on_once_its_lease_has_ended(url: str, tmp_path: Path) -> None:
    fill(tmp_path / "undisturbed", manifest(), batches=24, rows=250)
    command = [sys.executable, "-c", WRITE, url]
    root = Path(__file__).parents[2]
    for lines in (3, 7, 5):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root) as child:
            assert child.stdout is not None
            for _ in range(lines):
                assert child.stdout.readline()
            child.kill()
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=root)
    assert time.monotonic() - began > 1.0, "the lease of the killed one had to end first"
    assert same_rows(url, tmp_path / "undisturbed")


def test_a_second_writer_is_stopped_and_a_sleeping_one_notices(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "LEASE_S", 1.0)
    monkeypatch.setattr(claim, "RENEW_S", 0.2)
    create_store(url, manifest())
    with StoreWriter(url, manifest(), "p0000") as first:
        with pytest.raises(
            UserError, match=rf"writer p0000 of the store at {url} is process {os.getpid()} on .* already"
        ):
            StoreWriter(url, manifest(), "p0000")
        lease = cast(claim._Lease, first._claim)
        lease._ended.set()  # it sleeps, and renews its lease no more
        lease._thread.join()
        with StoreWriter(url, manifest(), "p0000"), pytest.raises(UserError, match="was taken over by another process"):
            first.finish({})  # it wakes up


def test_an_endpoint_that_is_dead_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setitem(arrays.RETRIES, "max_delay", "100ms")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"s3://rows/dead/manifest.json cannot be used \(.*(onnect|retry).*mend that"):
        StoreReader("s3://rows/dead")
    assert time.monotonic() - began < 30
