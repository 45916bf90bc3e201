"""HTTP servers for tests: one that serves a folder with range requests, and can be told to misbehave."""

import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FileServer:
    """Serves `folder`; counts requests and bytes; `breaks` connections after some bytes, answers `errors` first."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.bytes = 0
        self.break_after: int | None = None  # bytes of each answer
        self.errors: dict[str, int] = {}  # path -> answers with 503 that are left
        self.redirects: dict[str, str] = {}  # path -> where to
        self.ranges = True
        self.most_at_once = self._now = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with outer.lock:
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                try:
                    outer._answer(self)
                finally:
                    with outer.lock:
                        outer._now -= 1

            def do_HEAD(self) -> None:
                path = outer.folder / self.path.partition("?")[0].lstrip("/")
                self.send_response(200 if path.is_file() else 404)
                self.send_header("Content-Length", str(path.stat().st_size if path.is_file() else 0))
                self.send_header("Accept-Ranges", "bytes")
                self.end_headers()

            def log_message(self, *words: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        with self.lock:
            self.requests[request.path] += 1
            failing = self.errors.get(request.path, 0)
            self.errors[request.path] = max(0, failing - 1)
        path = self.folder / request.path.partition("?")[0].lstrip("/")
        if request.path in self.redirects:
            request.send_response(302)
            request.send_header("Location", self.redirects[request.path])
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if failing or not path.is_file():
            request.send_response(503 if failing else 404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if asked and self.ranges:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            part = content[first : last + 1]
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            part = content
            request.send_response(200)
        request.send_header("Content-Length", str(len(part)))
        request.send_header("ETag", f'"{hash(content)}"')
        request.end_headers()
        if self.break_after is not None and len(part) > self.break_after:
            part = part[: self.break_after]
            request.close_connection = True
        with self.lock:
            self.bytes += len(part)  # before they are sent: whoever has received them finds them counted
        request.wfile.write(part)


@contextmanager
def serving(folder: Path):
    """A running FileServer."""
    files = FileServer(folder)
    thread = threading.Thread(target=files.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield files
    finally:
        files.server.shutdown()
        files.server.server_close()
