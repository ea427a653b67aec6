"""A real HTTP server on this machine whose manners a test chooses: ranges, validators, connections that break."""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Manners:
    """What the server holds by path, how it behaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    if_range: bool = True
    validators: bool = True
    length: bool = True
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which the connections break, one for each request in turn."""
    status: list[int] = field(default_factory=list)
    """Answers of the first requests, instead of the file."""
    slow_s: float = 0.0
    """Between two pieces of 4 kB."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """(path, Range) of every request."""
    url: str = ""


@contextmanager
def serve(files: dict[str, bytes], **manners: object) -> Iterator[Manners]:
    """Serve on 127.0.0.1 at a free port until the block ends."""
    state = Manners(files={f"/{name}": content for name, content in files.items()}, **manners)  # type: ignore[arg-type]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            answer(self, state)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(handler: http.server.BaseHTTPRequestHandler, state: Manners) -> None:
    wanted = handler.headers.get("Range")
    state.asked.append((handler.path, wanted))
    handler.close_connection = True
    content = state.files.get(handler.path)
    if state.status or content is None:
        handler.send_response(state.status.pop(0) if state.status else 404)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    etag = f'"{hashlib.md5(content).hexdigest()}"'
    start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.ranges else 0
    if state.if_range and handler.headers.get("If-Range") not in (None, etag):
        start = 0
    if start >= len(content) > 0:
        handler.send_response(416)
        handler.send_header("Content-Range", f"bytes */{len(content)}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    handler.send_response(206 if start else 200)
    if state.validators:
        handler.send_header("ETag", etag)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    if state.length:
        handler.send_header("Content-Length", str(len(content) - start))
    handler.end_headers()
    end = start + state.cut_after.pop(0) if state.cut_after else len(content)
    try:
        for at in range(start, min(end, len(content)), 4096):
            handler.wfile.write(content[at : min(at + 4096, end)])
            time.sleep(state.slow_s)
    except OSError:
        pass  # the client is gone
