"""Ask whatever the service's own description allows, and what it does not: no fault, no undescribed answer.

    python -m load_tests schema --minutes 5

Schemathesis reads `/openapi.json`, makes requests that fit it and requests that just do not, and checks
status, media type, headers and body of every answer against it. No answer may be a 5xx.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Final

from load_tests import proof
from load_tests.proof import Deviation
from load_tests.scenarios import HOST

KEY: Final = "open sesame"
"""Of the administrator, so that loading is asked too."""

NOT_CHECKED: Final = ("positive_data_acceptance",)
"""What a schema allows may be refused: it cannot say which bytes are a picture."""

NOT_ASKED: Final = ("unload",)
"""After it the model would answer 503, as it should."""


def compare(port: int, seconds: float, seed: int) -> None:
    """Let Schemathesis ask the server at `port` for a while; its report is printed.

    Raises:
        Deviation: an answer was not as described.
    """
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"http://{HOST}:{port}/openapi.json"),
        *("--checks", "all", "--exclude-checks", ",".join(NOT_CHECKED), "--continue-on-failure"),
        *("--max-time", f"{seconds:.0f}", "--seed", str(seed), "--no-shrink", "--warnings", "off"),
        *("--header", f"Authorization: Bearer {KEY}", "--request-timeout", "60"),
        *(part for operation in NOT_ASKED for part in ("--exclude-operation-id", operation)),
    ]
    with tempfile.TemporaryDirectory(prefix="quintet-schema-") as folder:
        if subprocess.run(command, cwd=folder, check=False).returncode:
            raise Deviation("the service and its description do not agree; the report is above")


def main(arguments: Sequence[str]) -> int:
    """Start a server and compare it with its description; 0 if they agree."""
    parser = proof.parser_of("schema", __doc__)
    parser.add_argument("--minutes", type=float, default=5, help="(default %(default)s)")
    options = parser.parse_args(arguments)
    if find_spec("schemathesis") is None:
        print("schemathesis is not installed; it comes with the requirements for development.")
        return 2
    return proof.carry_out(
        options, lambda running: compare(running.port, options.minutes * 60, options.seed), admin_key=KEY
    )
