"""The load tests themselves: a short run is sane, a miss is a miss, and nothing is left running."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from load_tests import payloads, report
from load_tests.generators import ProgramMissing, require
from load_tests.report import Measurement
from load_tests.scenarios import Target, scenarios, targets
from service.models.digit import DIGIT
from tests.conftest import MODELS_FOLDER, ROOT

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk (Debian package wrk)")


def command(folder: Path) -> list[str]:
    few = ["--only", "quintet", "--workers", "1", "--rounds", "1", "--connections", "4"]
    short = ["--seconds", "2", "--warm-up", "1"]
    where = ["--models", str(MODELS_FOLDER), "--to", str(folder), "--name", "smoke"]
    return [sys.executable, "-m", "load_tests", *few, *short, *where]


def measured(requests_per_second: float, *problems: str) -> Measurement:
    return Measurement(requests_per_second, 1.0, 2.0, 100.0, 1.0, 0.0, problems)


@needs_wrk
def test_a_short_run_against_the_real_service_gives_sane_rows(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (record_file,) = tmp_path.glob("*-smoke.json")
    record = json.loads(record_file.read_text())
    assert "quintet PNG (1)" in record["rows"]
    for name, rounds in record["rows"].items():
        (one,) = rounds
        assert one["problems"] == [], name
        assert one["requests_per_second"] > 0, name
        assert 0 < one["p50_ms"] <= one["p99_ms"], name
        assert one["cpu_us"] > 0, name
    table = record_file.with_suffix(".md").read_text()
    assert "| quintet | PNG | 1 |" in table
    assert str(ROOT) not in table + record_file.read_text()


@needs_wrk
def test_nothing_is_left_running_after_control_c(tmp_path: Path) -> None:
    with subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        # Before it, maybe, what is not installed.
        assert any("round 1 of 1" in line for line in running.stdout)
        harness = psutil.Process(running.pid)
        while not (family := harness.children(recursive=True)):
            pass
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)
    assert running.returncode == 130
    assert not [process for process in family if process.is_running()]
    assert not list(tmp_path.iterdir())


def test_every_payload_carries_the_same_digit() -> None:
    pixels = DIGIT.to_tensor({"image": payloads.png()}).tensors[0]
    assert np.array_equal(pixels, payloads.digit())
    assert json.loads(payloads.json_array().body)["pixels"] == [pixels.tolist()]
    assert payloads.binary_tensor().body.endswith(pixels.tobytes())
    assert pixels.tobytes() in payloads.grpc_call().body
    assert payloads.png() in payloads.multipart_picture().body


@pytest.mark.parametrize(
    ("ours", "is_met"),
    [
        pytest.param([80, 90, 100], True, id="the-median-of-the-rounds-counts"),
        pytest.param([80, 84, 100], False, id="a-miss-is-a-miss"),
    ],
)
def test_targets_are_held_against_the_median(ours: list[float], is_met: bool) -> None:
    results = {"us": [measured(rate) for rate in ours], "them": [measured(100)] * 3}
    (verdict,) = report.judge(results, [Target("us", ("them",), at_least=0.85)])
    assert verdict.is_met is is_met


def test_the_best_of_several_peers_counts() -> None:
    results = {"us": [measured(10)], "slow": [measured(1)], "fast": [measured(5)]}
    (verdict,) = report.judge(results, [Target("us", ("slow", "fast"), at_least=5)])
    assert verdict.peer == "fast"
    assert not verdict.is_met


def test_an_invalid_row_meets_no_target() -> None:
    results = {"us": [measured(1000, "7 socket errors")], "them": [measured(1)]}
    (verdict,) = report.judge(results, [Target("us", ("them",), at_least=0.85)])
    assert verdict.ratio is None


def test_every_target_names_rows_that_are_measured() -> None:
    rows = scenarios(2)
    names = {row.name for row in rows}
    for target in targets(rows, 2):
        assert {target.ours, *target.peers} <= names


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ProgramMissing, match="nghttp2-client"):
        require("h2load")
