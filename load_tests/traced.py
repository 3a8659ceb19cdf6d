"""The service with every request traced, and the receiver of its spans beside it.

    python -m load_tests.traced --port 3000

The receiver takes what OTLP's exporter sends (`POST /v1/traces`) and forgets it: the price of
making and sending spans is measured, not that of keeping them.
"""

import argparse
import http.server
import os
import signal
import subprocess
import sys
import threading
from http import HTTPStatus

from load_tests.scenarios import HOST, quintet


class Receiver(http.server.BaseHTTPRequestHandler):
    """Reads spans, and says that it has them."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Take a batch of spans."""
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(HTTPStatus.OK)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Say nothing of it."""


def main() -> int:
    """Serve until told to stop; the service's exit code."""
    parser = argparse.ArgumentParser(prog="python -m load_tests.traced", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True, help="of the service's REST door")
    port = parser.parse_args().port
    receiver = http.server.ThreadingHTTPServer((HOST, 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    environment = {"QUINTET_TRACE_URL": f"http://{HOST}:{receiver.server_port}"}
    command = [part.format(port=port) for part in quintet(1).command]
    with subprocess.Popen(command, env=os.environ | environment) as service:
        signal.signal(signal.SIGTERM, lambda number, frame: service.terminate())
        return service.wait()


if __name__ == "__main__":
    sys.exit(main())
