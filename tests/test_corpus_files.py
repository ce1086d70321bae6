"""Corpora in buckets and on the hub: the documents of the local copy, and every failure said in bounded time.

S3 and GCS are real servers on loopback (moto, gcp-storage-emulator).
"""

from __future__ import annotations

import json
import os
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fac_jax import corpus_files, remote_file, text
from fac_jax.config.data import DataSet, Source
from fac_jax.corpus_files import LocalFile, fingerprints, matches, resolve
from fac_jax.errors import UserError
from fac_jax.runs import fingerprint
from fac_jax.text import Document, read_documents
from tests.activations.object_store import Server, gcs_server, s3_server
from tests.remote_corpora import hub_server, proxy, refusing_server, silent_server

VARIABLES = (
    *("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    *("TENSORSTORE_GCS_HTTP_URL", "STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"),
)
GLOBS = ["*.jsonl", "*", "**", "**/*.jsonl*", "*/*.csv", "**/?.parquet", "sub/**/*.txt", "[ab].*", "sub/*", "**/.*"]


@pytest.fixture(scope="module", params=["s3", "gcs"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    start = s3_server if request.param == "s3" else gcs_server
    with start(tmp_path_factory.mktemp(request.param)) as running, pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    """A folder of the test's own in the bucket."""
    return f"{server.url.partition('://')[0]}://rows/{request.node.originalname}"


def endpoint() -> tuple[str, str]:
    """The variable that says where the server is, and its value."""
    name = "AWS_ENDPOINT_URL" if "AWS_ENDPOINT_URL" in os.environ else "TENSORSTORE_GCS_HTTP_URL"
    return name, os.environ[name]


def put(url: str, content: bytes) -> None:
    """Write an object, by the server's own protocol and not by what reads it."""
    bucket, _, key = url.partition("://")[2].partition("/")
    if url.startswith("s3://"):
        boto3.client("s3", endpoint_url=endpoint()[1]).put_object(Bucket=bucket, Key=key, Body=content)
        return
    query = urllib.parse.urlencode({"uploadType": "media", "name": key})
    asked = urllib.request.Request(f"{endpoint()[1]}/upload/storage/v1/b/{bucket}/o?{query}", data=content)
    asked.add_header("Content-Type", "application/octet-stream")
    urllib.request.urlopen(asked).close()


def jsonl(count: int, start: int = 0) -> bytes:
    return b"".join(json.dumps({"text": f"document {i}"}).encode() + b"\n" for i in range(start, start + count))


def corpus(folder: Path) -> Path:
    """Files of every kind in folders, among them parquet with two row groups and columns that nobody asks for."""
    (folder / "sub/deep").mkdir(parents=True)
    with pa.CompressedOutputStream(str(folder / "a.jsonl.zst"), "zstd") as stream:
        stream.write(jsonl(600))
    rows = [{"label": i % 2, "text": f"row {i}", "more": os.urandom(1000), "other": i} for i in range(400)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "b.parquet", row_group_size=250)
    (folder / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(50, 5000))
    (folder / "sub/d.csv").write_text("\ufefftext,n\none,1\ntwo,2\n")
    (folder / "sub/deep/e.txt").write_text("alpha\nbeta\n")
    (folder / ".hidden.jsonl").write_bytes(jsonl(5, 9000))
    return folder


def upload(folder: Path, url: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            put(f"{url}/{file.relative_to(folder).as_posix()}", file.read_bytes())


def read(path: str, **options: Any) -> list[Document]:
    return list(read_documents(DataSet((Source(path, **options),)), "x"))


def error_of(path: str, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        read(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def local_names(folder: Path, pattern: str) -> list[str]:
    found = sorted(Path(name) for name in glob(f"{folder}/{pattern}", recursive=True))
    return [file.relative_to(folder).as_posix() for file in found if file.is_file()]


@pytest.mark.parametrize("pattern", GLOBS)
def test_a_pattern_matches_what_glob_finds(tmp_path: Path, pattern: str) -> None:
    folder = corpus(tmp_path)
    (folder / "sub/.kept").mkdir()
    (folder / "sub/.kept/f.txt").write_text("x")
    every = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    assert sorted(name for name in every if matches(name, pattern)) == sorted(local_names(folder, pattern)) != []


def test_the_documents_are_those_of_the_local_copy(server: Server, url: str, tmp_path: Path) -> None:
    folder = corpus(tmp_path)
    upload(folder, url)
    for pattern in GLOBS:
        names = [file.url.removeprefix(f"{url}/") for file in resolve(f"{url}/{pattern}")]  # type: ignore[attr-defined]
        assert names == local_names(folder, pattern) != []
    for pattern in ("a.jsonl.zst", "c.jsonl", "sub/*", "**/*"):
        assert read(f"{url}/{pattern}") == read(f"{folder}/{pattern}")
    labelled = read(f"{url}/*.parquet", label="label")
    assert labelled == read(f"{folder}/b.parquet", label="label") and len(labelled) == 400
    assert [f.size for f in resolve(f"{url}/*")] == [f.size for f in resolve(f"{folder}/*")]


def test_a_missing_field_is_said_as_of_a_local_file(server: Server, url: str, tmp_path: Path) -> None:
    folder = corpus(tmp_path)
    upload(folder, url)
    said = error_of(f"{url}/b.parquet", text="txt")
    assert said.startswith(
        "b.parquet:1: no field 'txt' (did you mean 'text'?); it has label, text, more, other; where another holds the "
        "text, name it on the source (text: FIELD); mend the row"
    )
    assert said == error_of(f"{folder}/b.parquet", text="txt")
    assert "b.parquet:1: no field 'lable' (did you mean 'label'?); it has label, text" in error_of(
        f"{url}/b.parquet", label="lable"
    )


def test_a_fingerprint_changes_with_the_object(server: Server, url: str) -> None:
    put(f"{url}/a.jsonl", jsonl(5))
    put(f"{url}/b.jsonl", jsonl(5, 50))
    before = fingerprints(f"{url}/*.jsonl")
    assert fingerprints(f"{url}/*.jsonl") == before and all(len(one) == 16 for one in before)
    put(f"{url}/b.jsonl", jsonl(5, 60))  # as many bytes, in the same second
    after = fingerprints(f"{url}/*.jsonl")
    assert after[0] == before[0] and after[1] != before[1]


def test_a_local_fingerprint_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(5))
    assert fingerprints(f"{tmp_path}/*") == [fingerprint(tmp_path / "a.jsonl")]


def test_what_is_missing_is_named(server: Server, url: str) -> None:
    put(f"{url}/a.jsonl", jsonl(5))
    other = url.replace("://rows", "://nobody")
    for path in (f"{url}/b.jsonl", f"{url}/*.csv", f"{url}/no/**/*.jsonl", f"{other}/a.jsonl", f"{other}/*.jsonl"):
        assert error_of(path) == f"{path}: no such object, or no such bucket; mend the path"
    scheme = url.partition("://")[0]
    for path in (f"{scheme}://rows", f"{scheme}://*/a.jsonl"):
        assert f"{path}: needs the form {scheme}://BUCKET/PATH" in error_of(path)


def test_what_passes_is_tried_again_and_the_reason_is_what_was_said() -> None:
    tries: list[float] = []

    def call(failures: int, then_s: float) -> str:
        tries.append(time.monotonic())
        if len(tries) <= failures:
            raise ConnectionError("refused")
        time.sleep(then_s)
        return "well"

    assert remote_file.patiently(lambda: call(1, 0.0), 5.0) == "well" and len(tries) == 2
    tries.clear()
    with pytest.raises(ConnectionError, match="refused"):
        remote_file.patiently(lambda: call(1, 2.0), 1.0)
    assert len(tries) == 2
    tries.clear()
    with pytest.raises(TimeoutError, match="no answer in"):
        remote_file.patiently(lambda: call(0, 2.0), 0.6)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(("scheme", "remedy"), [("s3", "AWS_ACCESS_KEY_ID"), ("gs", "GOOGLE_APPLICATION_CREDENTIALS")])
def test_a_refusal_names_the_credentials(
    scheme: str, remedy: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with refusing_server(status) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        began = time.monotonic()
        for path in (f"{scheme}://rows/a.jsonl", f"{scheme}://rows/*.jsonl"):
            said = error_of(path)
            assert said.startswith(f"{path} cannot be read (") and f"set {remedy}" in said and "error_info" not in said
    assert time.monotonic() - began < 5, "it is not tried again"


def test_an_object_that_changes_stops_the_run(server: Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that has as many bytes as before, and also when bad rows are left out."""
    monkeypatch.setattr(text, "BLOCK_BYTES", 4096)
    put(f"{url}/a.jsonl", jsonl(4000))
    documents = read_documents(DataSet((Source(f"{url}/a.jsonl"),), on_bad_row="skip"), "x")
    assert next(documents).text == "document 0"
    put(f"{url}/a.jsonl", jsonl(4000).replace(b"document", b"DOCUMENT"))
    texts = []
    with pytest.raises(UserError, match=r"a.jsonl changed or was deleted while it was read \(at byte [\d,]+ of"):
        for document in documents:
            texts.append(document.text)
    assert len(texts) < 4000 and not any("DOCUMENT" in one for one in texts)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_broken_connection_is_no_end_of_file(
    server: Server, url: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 16 * 1024)
    monkeypatch.setattr(remote_file, "READ_S", 1.0)
    content = jsonl(4000)
    if kind == "parquet":
        pq.write_table(
            pa.table({"text": [os.urandom(99).hex() for _ in range(4000)]}), tmp_path / "a", row_group_size=99
        )
        content = (tmp_path / "a").read_bytes()
    put(f"{url}/a.{kind}", content)
    name, address = endpoint()
    with proxy(urllib.parse.urlsplit(address).port or 0) as between:
        monkeypatch.setenv(name, f"http://127.0.0.1:{between.port}")
        assert len(read(f"{url}/a.{kind}")) == 4000
        documents = read_documents(DataSet((Source(f"{url}/a.{kind}"),), on_bad_row="skip"), "x")
        next(documents)
        between.cut_after(2_000)
        began = time.monotonic()
        with pytest.raises(UserError, match=rf"a.{kind}, at byte [\d,]+ of [\d,]+, cannot be read .*check the network"):
            list(documents)
        assert time.monotonic() - began < 15


@pytest.mark.parametrize("scheme", ["s3", "gs", "hf"])
@pytest.mark.parametrize("kind", ["dead", "silent"])
def test_a_server_that_does_not_answer_is_said(scheme: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_files, "CONTACT_S", 1.0)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with silent_server() as port:
        address = f"http://127.0.0.1:{port if kind == 'silent' else 9}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        point_hub_to(address, monkeypatch)
        began = time.monotonic()
        said = error_of("hf://datasets/owner/name/a.jsonl" if scheme == "hf" else f"{scheme}://rows/a.jsonl")
    assert time.monotonic() - began < 5
    assert f"{scheme}://" in said and "cannot be read (" in said
    assert said.endswith("check the network and the address of the server, then run the same command again")


def point_hub_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, which huggingface_hub reads when it is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


# A server of a few lines answers as the hub's documentation says. Not proved: that the real hub answers so (redirects
# to its storage, pages of long listings, gated data sets).
def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = corpus(tmp_path)
    files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    with hub_server({**files, "README.md": b"# a card"}) as hub:
        point_hub_to(hub.url, monkeypatch)
        base = "hf://datasets/owner/name"
        assert [file.name for file in resolve(base)] == ["a.jsonl.zst", "b.parquet", "c.jsonl"]
        for pattern in ("a.jsonl.zst", "sub/*", "**/*.txt"):
            assert read(f"{base}/{pattern}") == read(f"{base}@main/{pattern}") == read(f"{folder}/{pattern}")
        hub.answered.clear()
        labelled = read(f"{base}/b.parquet", label="label")
        assert labelled == read(f"{folder}/b.parquet", label="label")
        assert sum(count for _, count in hub.answered) < len(files["b.parquet"]) / 3, "two of four columns"
        before = fingerprints(f"{base}/*.jsonl")
        hub.files["README.md"] = b"# another card"
        assert fingerprints(f"{base}/*.jsonl") == before
        hub.files["c.jsonl"] = jsonl(50, 6000)
        assert fingerprints(f"{base}/*.jsonl") != before
        assert error_of(f"{base}/no.jsonl") == f"{base}/no.jsonl: no such file; mend the path"
        assert error_of(f"{base}/no/*.jsonl") == f"{base}/no/*.jsonl: no such file; mend the path"
        for path in (f"{base}@no/c.jsonl", "hf://datasets/owner/other/c.jsonl"):
            assert "check the name" in error_of(path)
        assert "needs the form hf://datasets/OWNER/NAME" in error_of("hf://owner/name/c.jsonl")
        monkeypatch.setattr(remote_file, "READ_S", 1.0)
        hub.cut = True
        assert "c.jsonl, at byte 0 of" in error_of(f"{base}/c.jsonl")
    monkeypatch.undo()
    assert "HF_HUB_OFFLINE is set" in error_of(base)


class CountedFile(LocalFile):
    """Counts the bytes that are read."""

    taken = 0

    def open(self) -> pa.NativeFile:
        outer = type(self)

        class Reader(remote_file.RemoteFile):
            def readinto(self, buffer: Any) -> int:
                count = super().readinto(buffer)
                outer.taken += count
                return count

        content = self.path.read_bytes()
        return pa.PythonFile(Reader("x", self.size, lambda at, n: content[at : at + n], lambda: None), mode="r")


def test_parquet_is_streamed_and_only_the_columns_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    noise = np.random.default_rng(0).integers(0, 2**60, 12_000)
    messages = [[{"role": "user", "content": f"row {i} {noise[-i]}"}] for i in range(12_000)]
    pq.write_table(pa.table({"noise": noise, "messages": messages, "label": noise % 2}), path, row_group_size=1200)
    monkeypatch.setattr(text, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(text, "resolve", lambda _: [CountedFile(path.name, path.stat().st_size, path)])
    documents = read_documents(DataSet((Source("x", text="messages", label="label"),)), "x")
    first, taken_first = next(documents), CountedFile.taken
    found = [first, *documents]
    assert found[1].text == f"row 1 {noise[-1]}" and len(found) == 12_000
    assert found[7].label == noise[7] % 2
    assert 0 < CountedFile.taken < path.stat().st_size - noise.nbytes / 2
    assert taken_first < CountedFile.taken / 3, "it is streamed"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "first"}\n{"text": "next"}\n'),
        ("a.json", '[{"text": "first"}, {"text": "next"}]'),
        ("a.csv", "text,n\nfirst,1\nnext,2\n"),
        ("a.txt", "first\nnext\n"),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert [document.text for document in read(f"{tmp_path}/{name}")] == ["first", "next"]
