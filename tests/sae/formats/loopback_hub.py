"""A Hugging Face hub on this machine: the few routes that downloads take, over a folder OWNER/NAME/FILES."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def loopback_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `root`; yields the address, and the list of the files that were fetched, which grows."""
    fetched: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"] and (root / parts[2] / parts[3]).is_dir():
                self._describe(root / parts[2] / parts[3], listing="tree" in parts)
            elif len(parts) > 4 and parts[2] == "resolve" and (root / parts[0] / parts[1]).is_dir():
                self._file(root / parts[0] / parts[1], "/".join(parts[4:]))
            else:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _describe(self, repository: Path, listing: bool) -> None:
            files = [path for path in repository.rglob("*") if path.is_file()]
            names = [str(path.relative_to(repository)) for path in files]
            if listing:
                entries = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": self._tag(path)}
                    for name, path in zip(names, files, strict=True)
                ]
                self._send(200, json.dumps(entries).encode())
                return
            siblings = [{"rfilename": name} for name in names]
            described = {"id": "/".join(repository.parts[-2:]), "sha": COMMIT, "siblings": siblings}
            self._send(200, json.dumps(described).encode())

        def _file(self, repository: Path, name: str) -> None:
            path = repository / name
            if not path.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            if self.command == "GET":
                fetched.append(name)
            self._send(200, path.read_bytes(), {"ETag": f'"{self._tag(path)}"', "X-Repo-Commit": COMMIT})

        def _tag(self, path: Path) -> str:
            return hashlib.sha1(path.read_bytes()).hexdigest()

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
