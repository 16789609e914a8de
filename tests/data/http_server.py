"""An HTTP server of a folder that can go away, cut answers off, leave out their length, refuse, and send a page."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path


class FolderServer:
    """Serve the files of `folder` on one port, between `start` and `stop`, as often as these are called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self.requests: list[str] = []
        self.cut = 0
        """How many of the next answers end in the middle."""
        self.length = True
        """Whether answers state their length."""
        self.page = False
        """Whether every answer is a proxy's page, of status 200."""
        self.status = 200
        """Another status is answered to every request."""
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(self.path)
                path = server.folder / self.path.partition("?")[0].lstrip("/")
                if server.status != 200 or not path.is_file():
                    self.send_error(server.status if server.status != 200 else 404)
                    return
                data = b"<html>502 Bad Gateway</html>" if server.page else path.read_bytes()
                cut = server.cut > 0
                server.cut -= cut
                self.send_response(200)
                if server.length:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if cut:
                    data = data[: len(data) // 2]
                self.wfile.write(data)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        return Handler
