"""A hub on loopback with one data set repository, me/mine: what huggingface_hub asks for a push, as far as it goes."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

REPOSITORY = "/api/datasets/me/mine"


class HubServer:
    """`with HubServer() as server:` answers at `server.url`."""

    def __init__(self) -> None:
        self.repository: dict[str, str] = {}
        """Its settings; empty before it is created."""
        self.files: dict[str, bytes] = {}
        self.keys: set[str] = set()
        self.opened_last = False
        """Whether the files were there when everyone was let in."""
        self.forbids = False
        """Whether writes are answered with 403."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.path.startswith(("/api/repos", "/api/datasets")):
                    server.keys.add(self.headers.get("Authorization", ""))
                status, answer = server.answer(self.command, self.path, body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = _answer

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and answer of one request."""
        if method != "GET" and self.forbids and path != "/api/validate-yaml":
            return 403, {"error": "this key may not write"}
        if path == "/api/repos/create":
            self.repository["visibility"] = json.loads(body)["visibility"]
            return 200, {"url": f"{self.url}/datasets/me/mine"}
        if path == f"{REPOSITORY}/settings":
            self.repository |= json.loads(body)
            self.opened_last = bool(self.files) and self.repository["visibility"] == "public"
            return 200, {}
        if path.startswith(f"{REPOSITORY}/preupload"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return 200, {"files": [{**file, "shouldIgnore": False} for file in files]}
        if path.startswith(f"{REPOSITORY}/commit"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/datasets/me/mine/commit/{'a' * 40}", "commitOid": "a" * 40}
        if path.startswith(f"{REPOSITORY}/tree"):
            return 200, []
        if path.startswith(REPOSITORY):
            private = self.repository.get("visibility") == "private"
            return (200, {"id": "me/mine", "private": private}) if self.repository else (404, {"error": "none"})
        return 200, {}
