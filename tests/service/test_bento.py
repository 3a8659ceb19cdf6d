"""The Bento that `bentoml build` makes holds all that the service needs: models, page and pins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from load_tests.doors import body_of
from tests.conftest import ROOT, SHIPPED, QuintetServer

from .knocking import http_client


@pytest.fixture
def bento(tmp_path: Path) -> Path:
    """The folder of a Bento that was built a moment ago, in a home of its own."""
    environment = os.environ | {"BENTOML_HOME": str(tmp_path / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"}
    command = [sys.executable, "-m", "bentoml", "build", "--output", "tag"]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (tag,) = [line.removeprefix("__tag__:") for line in built.stdout.splitlines() if "__tag__:" in line]
    return tmp_path / "bentoml" / "bentos" / tag.replace(":", "/")


def test_the_bento_answers_for_all_models_and_has_the_page(bento: Path, tmp_path: Path) -> None:
    # From a folder without our code, and with the Bento's own models, so that nothing else can answer.
    server = QuintetServer(tmp_path, str(bento), models=bento / "src" / "models", workers=1, drain_seconds=0)
    try:
        server.wait_until_ready()
        with http_client(server) as client:
            for room in SHIPPED.values():
                response = client.post(f"/{room.name}", **body_of(room, [room.example]))
                assert response.status_code == 200, response.text
            page = client.get("/", headers={"Accept": "text/html"})
            assert page.headers["content-type"].startswith("text/html")
            assert client.get("/assets/main.js").status_code == 200
            assert client.get("/docs").status_code == 200
    finally:
        server.stop()


def test_the_bento_has_pins_and_nothing_that_only_we_need(bento: Path) -> None:
    names = {path.name for path in (bento / "src").iterdir()}
    assert names >= {"service", "models", "clients", "requirements", "bentofile.yaml"}
    assert not names & {"training", "export", "tests", "load_tests", "docs", "notebooks"}
    pins = (bento / "env" / "python" / "requirements.txt").read_text()
    assert "onnxruntime==" in pins
    assert "torch" not in pins
