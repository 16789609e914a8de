"""A server on this machine that answers as the Hub does: what data sets hold, commit by commit, and their files."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

import pytest

REPOSITORY = "datasets/owner/name"


class HubServer:
    """Serve one data set, `owner/name`."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.token: str | None = None
        """With which alone the data set is found."""
        self.broken = 0
        """How many of the next requests of a file are answered by status 503."""
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def push(self, files: dict[str, bytes]) -> str:
        """Make a commit, which `main` is from now on, and return its name."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = self.commits["main"] = files
        self.newest = commit
        return commit

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, path: str, authorization: str | None) -> tuple[int, str, bytes]:
        """Return status, error code and content."""
        api, at = f"/api/{REPOSITORY}", path.split("/")
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 401, "RepoNotFound", b"{}"
        if path == api or path.startswith(f"{api}/revision/"):
            revision = "main" if path == api else at[6]
            known, commit = revision in self.commits, self.newest if revision == "main" else revision
            about = {"id": "owner/name", "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0}
            return (200, "", json.dumps(about).encode()) if known else (404, "RevisionNotFound", b"{}")
        if path.startswith(f"{api}/tree/") and at[6] in self.commits:
            entries = self._tree(self.commits[at[6]], "/".join(at[7:]))
            return (200, "", json.dumps(entries).encode()) if entries else (404, "EntryNotFound", b"{}")
        if path.startswith(f"/{REPOSITORY}/resolve/"):
            if self.broken:
                self.broken -= 1
                return 503, "", b""
            content = self.commits.get(at[5], {}).get("/".join(at[6:]))
            return (404, "EntryNotFound", b"") if content is None else (200, "", content)
        return 404, "RepoNotFound", b"{}"

    @staticmethod
    def _tree(files: dict[str, bytes], folder: str) -> list[dict[str, object]]:
        entries: list[dict[str, object]] = []
        for name, content in files.items():
            if name.startswith(f"{folder}/" if folder else ""):
                blob = hashlib.sha1(content).hexdigest()
                entries.append({"type": "file", "path": name, "size": len(content), "oid": blob})
        folders = {str(entry["path"]).rpartition("/")[0] for entry in entries} - {"", folder}
        return entries + [{"type": "directory", "path": name, "oid": "0"} for name in sorted(folders)]

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(self.path)
                path = unquote(urlsplit(self.path).path)
                status, code, content = server._answer(path, self.headers["Authorization"])
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                if code:
                    self.send_header("X-Error-Code", code)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@contextmanager
def hub() -> Iterator[HubServer]:
    """Run such a server, which addresses of hf:// mean."""
    server = HubServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.url)
        patch.delenv("HF_TOKEN", raising=False)
        yield server
    server.stop()
