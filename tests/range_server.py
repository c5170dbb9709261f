"""A small HTTP server with range requests; it counts the bytes it sends and misbehaves on request."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@dataclass
class Request:
    """A request that came.

    Attributes:
        method, path: Of its first line; the path without the query.
        query: What stood behind the question mark.
        headers: By their names in lower case.
        start, stop: The range that was asked for, if one was.
    """

    method: str
    path: str
    query: str
    headers: dict[str, str]
    start: int | None = None
    stop: int | None = None


@dataclass
class RangeServer:
    """The files of a directory, over HTTP.

    Attributes:
        root: The directory.
        url: Where the server is.
        requests: All requests that came.
        sent: Bytes of bodies that were sent for ranges.
        answer: Answers a request instead of the server if it returns True; it is given the handler and the request.
        ranges, etags, listings: Whether the server has them.
    """

    root: Path
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    sent: int = 0
    answer: Callable[[Any, Request], bool] | None = None
    ranges: bool = True
    etags: bool = True
    listings: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def asked(self) -> list[tuple[int, int]]:
        """The ranges that were asked for, in the order in which the requests came."""
        return [(each.start, each.stop) for each in self.requests if each.start is not None and each.stop is not None]

    def reset(self) -> None:
        """Count from zero."""
        self.requests.clear()
        self.sent = 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients break off, and tests make them."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: RangeServer

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        state = self.state
        path, _, query = self.path.partition("?")
        request = Request(self.command, path, query, {key.lower(): value for key, value in self.headers.items()})
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if found:
            request.start, request.stop = int(found[1]), int(found[2]) + 1
        with state.lock:
            state.requests.append(request)
        try:
            if state.answer is None or not state.answer(self, request):
                self.serve(request)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def serve(self, request: Request) -> None:
        state = self.state
        file = state.root / request.path.lstrip("/")
        if file.is_dir() and state.listings:
            links = "".join(f'<a href="{each.name}{"/" * each.is_dir()}">.</a>' for each in sorted(file.iterdir()))
            self.say(200, f"<html>{links}</html>".encode(), {"Content-Type": "text/html"})
            return
        if not file.is_file():
            self.say(404)
            return
        size = file.stat().st_size
        headers = {"ETag": self.etag(file)} if state.etags else {}
        if request.headers.get("if-match", headers.get("ETag")) != headers.get("ETag"):
            self.say(412)
            return
        start, stop = 0, size
        if request.start is not None and request.stop is not None and state.ranges:
            start, stop = request.start, min(request.stop, size)
            if start >= size:
                self.say(416, b"", {"Content-Range": f"bytes */{size}"})
                return
            headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        with file.open("rb") as opened:
            opened.seek(start)
            data = opened.read(stop - start) if self.command == "GET" else b""
        self.say(206 if "Content-Range" in headers else 200, data, headers, stop - start)

    def etag(self, file: Path) -> str:
        about = file.stat()
        return '"' + hashlib.sha256(f"{about.st_mtime_ns} {about.st_size}".encode()).hexdigest()[:20] + '"'

    def say(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            with self.state.lock:
                self.state.sent += len(body)


@contextmanager
def serving(root: Path) -> Iterator[RangeServer]:
    """A server of the files in a directory, as long as the context lasts."""
    state = RangeServer(root)
    handler = type("Handler", (_Handler,), {"state": state})
    server = _Server(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def endless(handler: Any, request: Request) -> bool:
    """Answer a range by a body that does not end."""
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {request.start}-{(request.stop or 0) - 1}/1000000000")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for _ in range(10_000):
        handler.wfile.write(b"10000\r\n" + b"\0" * 65536 + b"\r\n")
        time.sleep(0.0001)
    return True
