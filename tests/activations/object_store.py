"""Object stores on loopback, each in a process of its own: `moto`'s S3 server and `gcp-storage-emulator`.

python object_store.py PORT     the second one; it names no generation of an object in its answers to downloads, which
                                Google's does and tensorstore needs, so that header is added here
"""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Server:
    """A running server: a URL for a store in its bucket, and the environment that leads there."""

    url: str
    environment: dict[str, str]
    log: Path

    def requests(self, method: str, key: str) -> int:
        """How many requests of this kind it has answered whose path matches `key`."""
        return len(re.findall(rf"{method} \S*{key}", self.log.read_text().replace("%2F", "/")))


@contextmanager
def s3_server(folder: Path) -> Iterator[Server]:
    """moto's S3, with a bucket called `rows`."""
    port, log = _free_port(), folder / "s3.log"
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    endpoint = f"http://127.0.0.1:{port}"
    with _running(command, log, f"{endpoint}/moto-api/"):
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/rows", method="PUT")).close()
        yield Server("s3://rows/a/store", {**keys, "AWS_ENDPOINT_URL": endpoint}, log)


@contextmanager
def gcs_server(folder: Path) -> Iterator[Server]:
    """gcp-storage-emulator, with a bucket called `rows`."""
    port, log = _free_port(), folder / "gcs.log"
    endpoint = f"http://127.0.0.1:{port}"
    environment = {"TENSORSTORE_GCS_HTTP_URL": endpoint, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test"}
    with _running([sys.executable, "-u", __file__, str(port)], log, f"{endpoint}/storage/v1/b/rows"):
        yield Server("gs://rows/a/store", environment, log)


@contextmanager
def _running(command: list[str], log: Path, health: str) -> Iterator[None]:
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        try:
            until = time.monotonic() + 60
            while not _answers(health):
                assert server.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            yield
        finally:
            server.kill()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve_gcs(port: int) -> None:
    from gcp_storage_emulator import server
    from gcp_storage_emulator.handlers import objects

    logging.basicConfig(level=logging.DEBUG, format="%(message)s")
    download = objects.download

    def with_generation(request: Any, response: Any, storage: Any, *arguments: Any, **named: Any) -> None:
        try:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]
        except Exception:  # not there: the emulator itself says so
            pass
        download(request, response, storage, *arguments, **named)

    objects.download = with_generation
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket="rows").run()


if __name__ == "__main__":
    os.chdir("/")
    _serve_gcs(int(sys.argv[1]))
