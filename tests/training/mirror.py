"""A real HTTP server with the faults that mirrors have."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Mirror:
    """What the server does, and what it was asked.

    Attributes:
        address: Where it listens, with a slash at the end.
        files: Path to content; what is not here is answered with 404.
        breaks_after: After so many bytes of an answer the connection is cut; one entry for each
            answer, and none once they are used up.
        knows_ranges: Whether it sends the rest of a file where only that is asked for.
        refuses: So many requests are answered with 503 first.
        pause: Waited for before the second half of an answer is sent.
        asked: Path and `Range` header of each request.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    breaks_after: list[int] = field(default_factory=list)
    knows_ranges: bool = True
    refuses: int = 0
    pause: threading.Event | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@contextlib.contextmanager
def serving() -> Iterator[Mirror]:
    """A mirror, as long as the `with` lasts."""
    mirror = Mirror()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing: the suite's output is for failures."""

        def do_GET(self) -> None:
            path, wanted = self.path.lstrip("/"), self.headers["Range"]
            mirror.asked.append((path, wanted))
            content = mirror.files.get(path)
            if mirror.refuses or content is None:
                self._answer(503 if mirror.refuses else 404, b"")
                mirror.refuses = max(0, mirror.refuses - 1)
                return
            start = (
                int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and mirror.knows_ranges else 0
            )
            if start >= len(content):
                self._answer(416, b"", f"bytes */{len(content)}")
            elif start:
                self._answer(206, content[start:], f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self._answer(200, content)

        def _answer(self, status: int, content: bytes, content_range: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            sent = mirror.breaks_after.pop(0) if content and mirror.breaks_after else len(content)
            half = len(content) // 2 if mirror.pause else sent
            self.wfile.write(content[: min(half, sent)])
            if mirror.pause:
                self.wfile.flush()
                mirror.pause.wait(60)
                self.wfile.write(content[half:sent])
            self.close_connection = sent < len(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        mirror.address = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield mirror
        server.shutdown()
