"""What servers of corpora do: break connections off, never answer, refuse; and a small model hub.

python remote_corpora.py PORT     the proxy; a process of its own, as pyarrow asks for the first bytes of an object of
                                  Google's while it keeps all other threads from running
"""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Proxy:
    """Relays connections between `port` and another one."""

    port: int
    process: subprocess.Popen[str]

    def cut_after(self, count: int) -> None:
        """From now on it closes each connection after so many bytes of answers."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == f"{count}\n"


@contextmanager
def proxy(target: int) -> Iterator[Proxy]:
    """A `Proxy` before a port of this machine."""
    command = [sys.executable, "-u", __file__, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Proxy(int(process.stdout.readline()), process)
        finally:
            process.kill()


def _serve_proxy(target: int) -> None:
    limit: list[int] = []

    def relay(source: socket.socket, to: socket.socket, answers: bool) -> None:
        sent = 0
        try:
            while data := source.recv(4096):
                to.sendall(data)
                sent += len(data)
                if answers and limit and sent >= limit[0]:
                    break
        except OSError:
            pass
        for end in (source, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept(listener: socket.socket) -> None:
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", target))
            for pair in ((client, server, False), (server, client, True)):
                threading.Thread(target=relay, args=pair, daemon=True).start()

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=accept, args=(listener,), daemon=True).start()
    print(listener.getsockname()[1])
    for line in sys.stdin:
        limit[:] = [int(line)]
        print(limit[0])


@contextmanager
def silent_server() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener.getsockname()[1]


@contextmanager
def refusing_server(status: int) -> Iterator[str]:
    """The address of a server that answers everything with `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    with _serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        yield address


@contextmanager
def _serving(server: ThreadingHTTPServer) -> Iterator[str]:
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Hub:
    """A data set `owner/name` with `files`, answered as the hub does: information, tree, paths, ranges of files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.answered: list[tuple[str, int]] = []
        """(path, bytes) of every file that was asked for."""
        self.cut = False
        """Whether answers to requests for files end half way."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._get(self)

            def do_HEAD(self) -> None:
                hub._get(self)

            def do_POST(self) -> None:
                hub._paths_info(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def commit(self) -> str:
        """Changes with the files."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def _entry(self, path: str) -> dict[str, Any]:
        content = self.files[path]
        entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if path.endswith(".parquet"):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def _get(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        api, _, rest = path.partition("/api/datasets/owner/name")
        if path.startswith("/api/datasets/owner/name"):
            if rest in ("", "/revision/main", f"/revision/{self.commit()}"):
                self._json(request, {"id": "owner/name", "sha": self.commit(), "siblings": []})
            elif rest.startswith(f"/tree/{self.commit()}"):
                folder = rest.removeprefix(f"/tree/{self.commit()}").strip("/")
                recursive = "recursive=true" in request.path.lower()
                inside = [p for p in self.files if p.startswith(f"{folder}/" if folder else "")]
                flat = [p for p in inside if recursive or "/" not in p[len(folder) :].strip("/")]
                if inside:
                    self._json(request, [self._entry(p) for p in flat])
                else:
                    self._json(request, {"error": "no such folder"}, 404, "EntryNotFound")
            else:
                self._json(request, {"error": "no such revision"}, 404, "RevisionNotFound")
        elif path.startswith(f"/datasets/owner/name/resolve/{self.commit()}/"):
            self._file(request, path.partition(f"{self.commit()}/")[2])
        else:
            self._json(request, {"error": "no such repository"}, 404, "RepoNotFound")

    def _paths_info(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"])).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else [unquote(p[6:]) for p in body.split("&")]
        self._json(request, [self._entry(p) for p in asked if p in self.files])

    def _file(self, request: BaseHTTPRequestHandler, path: str) -> None:
        content = self.files[path]
        low, high = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
        part = content[low : high + 1]
        self.answered.append((path, len(part)))
        request.send_response(206)
        request.send_header("Content-Range", f"bytes {low}-{low + len(part) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        request.wfile.write(part[: len(part) // 2] if self.cut else part)
        if self.cut:
            request.close_connection = True

    def _json(self, request: BaseHTTPRequestHandler, value: Any, status: int = 200, code: str = "") -> None:
        body = json.dumps(value).encode()
        request.send_response(status)
        if status != 200:
            request.send_header("X-Error-Code", code)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


@contextmanager
def hub_server(files: dict[str, bytes]) -> Iterator[Hub]:
    """A `Hub` that runs."""
    hub = Hub(files)
    with _serving(hub.server):
        yield hub


if __name__ == "__main__":
    _serve_proxy(int(sys.argv[1]))
