"""The load tests themselves: a short run is sane, a miss is a miss, and nothing is left running."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest

from load_tests import claims, payloads, report
from load_tests.claims import Verdict
from load_tests.generators import ProgramMissing, arrive, require
from load_tests.limit import Way, open_network
from load_tests.measurement import Measurement, Results, best
from load_tests.peers import environments
from load_tests.peers.answer_asgi import Answering
from load_tests.peers.bare_asgi import Bare
from load_tests.report import Outcome
from load_tests.scenarios import Scenario, Section, Server, quintet, sections, triton
from load_tests.tune import Choice, gain, search, write
from service.http import Message, Receive, Scope, Send
from service.models import MODELS
from service.models.digit import DIGIT
from service.providers import NVIDIA_CARDS
from service.settings import SETTINGS_FILE, Settings, read_settings
from tests.conftest import MODELS_FOLDER, ROOT, SHIPPED, QuintetServer

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk (Debian package wrk)")


def command(folder: Path, *more: str) -> list[str]:
    few = ["--workers", "1", "--rounds", "1", "--connections", "4", "--seconds", "1", "--warm-up", "1"]
    where = ["--models", str(MODELS_FOLDER), "--to", str(folder), "--name", "smoke"]
    return [sys.executable, "-m", "load_tests", *few, *where, *more]


def measured(rate: float, *problems: str, inputs: int = 1, p50_ms: float = 1.0) -> Measurement:
    return Measurement(rate, p50_ms, 1.5, 2.0, inputs=inputs, problems=problems)


def judged(claim: claims.Claim, results: Results) -> Verdict:
    return claim.judge(results)


@needs_wrk
def test_a_short_run_against_the_real_service_gives_sane_rows(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, "--only", "doors"), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (record_file,) = tmp_path.glob("*-smoke-doors.json")
    record = json.loads(record_file.read_text())
    for name, rounds in record["rows"].items():
        if name in record["absent"]:
            assert "not installed" in record["absent"][name]
            continue
        (one,) = rounds
        assert one["problems"] == [], name
        assert one["requests_per_second"] > 0, name
        assert 0 < one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"], name
        assert one["cpu_us"] > 0, name
        assert one["memory_mib"] > 0, name
        assert sum(one["batches"].values()) > 0, name
    table = record_file.with_suffix(".md").read_text()
    assert "| quintet | PNG | 1 |" in table
    assert str(ROOT) not in table + record_file.read_text()
    assert record_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@needs_wrk
def test_a_peer_that_is_not_installed_is_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUINTET_PEERS", str(tmp_path / "none"))
    asked = command(tmp_path, "--only", "digit-rest", "--servers", "mosec")
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = tmp_path.glob("*-smoke-digit-rest.md")
    (line,) = [line for line in table.read_text().splitlines() if line.startswith("| mosec")]
    assert "NOT MEASURED: not installed; python -m load_tests peers install mosec" in line
    assert "NOT MEASURED: POST /digit against mosec" in table.read_text()


@needs_wrk
def test_nothing_is_left_running_after_control_c(tmp_path: Path) -> None:
    # So long that it does not end by itself before it is told to.
    asked = command(tmp_path, "--only", "doors", "--seconds", "60")
    # Whoever started us in the background may have had us ignore it, and children inherit that.
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(asked, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=heeded) as running:
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


def test_every_payload_carries_the_same_digits() -> None:
    for number, digit in enumerate(payloads.digits()):
        (pixels,) = DIGIT.to_tensor({"image": payloads.pngs("digit")[number]}).tensors
        assert np.array_equal(pixels, digit)
        assert json.loads(payloads.json_arrays().bodies[number])["pixels"] == [digit.tolist()]
        (tensor,) = json.loads(payloads.json_tensor().bodies[number])["inputs"]
        assert tensor["data"] == digit.ravel().tolist()
        assert payloads.binary_tensor().bodies[number].endswith(digit.tobytes())
        assert payloads.pngs("digit")[number] in payloads.multipart_pictures().bodies[number]
    assert payloads.digits()[0].tobytes() in payloads.grpc_call().bodies[0]
    assert payloads.grpc_stream().bodies[0] == payloads.grpc_call().bodies[0] * payloads.STREAMED


def test_a_request_of_several_inputs_begins_with_the_one_that_it_is_read_by() -> None:
    one, several = payloads.binary_tensor(), payloads.binary_tensor("digit", 4)
    for single, stack in zip(one.bodies, several.bodies, strict=True):
        assert single[-28 * 28 :] == stack[-4 * 28 * 28 : -3 * 28 * 28]
    rows = np.arange(40, dtype="<f4")
    assert several.read(rows.tobytes()).tolist() == list(range(10))


def test_reviews_are_of_many_lengths() -> None:
    lengths = sorted(len(text.split()) for text in payloads.reviews())
    assert lengths[0] < 10
    assert lengths[-1] > 250
    assert len(set(payloads.reviews())) == payloads.REVIEWS


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_something_to_be_asked(model: str) -> None:
    assert payloads.room_payload(model).model == model
    assert payloads.inputs_of(model)


@pytest.mark.parametrize(
    ("ours", "is_met"),
    [
        pytest.param([80, 90, 100], True, id="the-median-of-the-rounds-counts"),
        pytest.param([80, 84, 100], False, id="a-miss-is-a-miss"),
    ],
)
def test_targets_are_held_against_the_median(ours: list[float], is_met: bool) -> None:
    results = {"us": [measured(rate) for rate in ours], "them": [measured(100)] * 3}
    verdict = judged(claims.times("", "us", ["them"], 0.85), results)
    assert (verdict.is_met, verdict.is_missed) == (is_met, not is_met)


def test_the_best_of_several_peers_counts() -> None:
    results = {"us": [measured(10)], "slow": [measured(1)], "fast": [measured(5)]}
    verdict = judged(claims.times("", "us", ["slow", "fast"], 5), results)
    assert verdict.against == "fast"
    assert verdict.is_missed


def test_a_peer_that_was_given_up_after_the_first_round_is_not_the_best() -> None:
    assert best({"given up": [measured(9)], "kept": [measured(5)] * 3}, ["given up", "kept"]) == "kept"


def test_an_invalid_row_meets_no_target_and_misses_none() -> None:
    results = {"us": [measured(1000, "7 socket errors")], "them": [measured(1)]}
    verdict = judged(claims.times("", "us", ["them"], 0.85), results)
    assert verdict.outcome == "NOT MEASURED"
    assert not verdict.is_missed


def test_a_row_that_broke_now_and_then_is_judged_by_the_rounds_it_lived_through() -> None:
    broken = measured(0, "the server ended")
    ours = [measured(30), measured(50), measured(70), measured(90)]
    theirs = [measured(10), broken, measured(10), measured(10)]
    assert best({"them": theirs, "others": [measured(9)] * 4}, ["them", "others"]) == "them"
    verdict = judged(claims.times("", "us", ["them"], 5), {"us": ours, "them": theirs})
    assert verdict.found is not None
    assert (verdict.found.least, verdict.found.median, verdict.found.most) == (3, 7, 9)
    too_often = [*theirs[:3], broken]
    assert judged(claims.times("", "us", ["them"], 5), {"us": ours, "them": too_often}).found is None


def test_the_limit_is_what_the_parts_take_one_after_another() -> None:
    # 1 ms for the one part and 3 ms for the other: 250 a second at best.
    results = {"us": [measured(225)], "answer": [measured(1000)], "run": [measured(1000 / 3)]}
    verdict = judged(claims.of_the_limit("", "us", ["answer", "run"], 0.9), results)
    assert verdict.found is not None
    assert verdict.found.median == pytest.approx(0.9)


def test_inputs_count_and_not_requests() -> None:
    results = {"us": [measured(10, inputs=16)], "them": [measured(100)]}
    verdict = judged(claims.times("", "us", ["them"], 1.5), results)
    assert verdict.is_met


def test_the_least_share_of_a_crowd_counts() -> None:
    results = {"a+": [measured(50)], "b+": [measured(20)], "a": [measured(100)], "b": [measured(50)]}
    verdict = judged(claims.fair_shares("", ["a+", "b+"], ["a", "b"], 0.8), results)
    assert verdict.found is not None
    assert verdict.found.median == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("rates", "least"),
    [
        pytest.param([1, 5, 10, 9.5], 0.95, id="before-the-peak-it-may-be-slow"),
        pytest.param([1, 10, 5, 9], 0.5, id="a-dip-after-the-peak-counts"),
    ],
)
def test_throughput_must_not_fall_after_its_peak(rates: list[float], least: float) -> None:
    results = {str(place): [measured(rate)] for place, rate in enumerate(rates)}
    verdict = judged(claims.keeps_up("", list(results), ""), results)
    assert verdict.found is not None
    assert verdict.found.median == pytest.approx(least)


def test_rounds_that_lie_too_far_apart_are_told() -> None:
    row = Scenario(quintet(1), payloads.pictures("digit"))
    section = Section("one", "One", (row,))
    assert not Outcome(section, {row.name: [measured(50), *[measured(100)] * 3]}).unsteady()
    unsteady = Outcome(section, {row.name: [measured(100), measured(100), measured(120)]}).unsteady()
    assert unsteady == {row.name: pytest.approx(0.2)}


def test_a_peer_may_run_less_evenly_than_the_service() -> None:
    row = Scenario(quintet(1), payloads.pictures("digit"), choice="some peer")
    section = Section("one", "One", (row,))
    assert not Outcome(section, {row.name: [measured(100), measured(100), measured(120)]}).unsteady()
    assert Outcome(section, {row.name: [measured(100), measured(100), measured(130)]}).unsteady()


@pytest.mark.parametrize(
    ("server", "is_invalid"), [(quintet(1), True), (triton(1), False)], ids=["ours", "a peer"]
)
def test_only_a_peer_may_break_now_and_then(server: Server, *, is_invalid: bool) -> None:
    row = Scenario(server, payloads.binary_tensor())
    rounds = [measured(100), measured(0, "the server ended"), measured(100), measured(101)]
    outcome = Outcome(Section("one", "One", (row,)), {row.name: rounds})
    assert outcome.invalid() == ([row.name] if is_invalid else [])
    note = report.rows(outcome)[0][-1]
    assert note == ("INVALID: the server ended" if is_invalid else "broke in 1 of 4 rounds: the server ended")


def test_every_row_of_a_section_has_a_name_of_its_own() -> None:
    for section in sections(2, MODELS).values():
        names = sorted(row.name for row in section.rows)
        assert all(one != other for one, other in pairwise(names)), section.name


def test_a_repository_without_a_model_lacks_its_sections_only() -> None:
    assert set(sections(2, ["digit"])) >= {"digit-rest", "grpc", "latency", "mixed"}
    assert "image" not in sections(2, ["digit"])


def test_every_peer_with_an_environment_says_what_it_needs() -> None:
    used = {row.server.peer for section in sections(2, MODELS).values() for row in section.rows}
    assert used - {""} == set(environments.names())


@needs_wrk
def test_requests_come_by_themselves_at_about_the_rate_that_was_asked_for(
    quintet_server: QuintetServer, tmp_path: Path
) -> None:
    payload = payloads.pictures("digit")
    seen = arrive(quintet_server.http_port, payload, seconds=3, rate=200, scratch=tmp_path)
    # Poisson: 600 on average, and five standard deviations either way.
    assert 475 <= seen.requests <= 725
    assert not seen.problems
    assert 0 < seen.p50_ms <= seen.p95_ms <= seen.p99_ms


@pytest.mark.parametrize("decodes", [False, True], ids=["ready", "decoded"])
@pytest.mark.parametrize("model", SHIPPED)
def test_a_network_runs_bare(model: str, decodes: bool) -> None:
    network = open_network(model, MODELS_FOLDER)
    runs = network.measure(Way(lanes=2, threads=1, batch=3), 0.05, decodes=decodes)
    assert runs.inputs >= 6
    assert runs.inputs % 3 == 0
    assert runs.inputs_per_second > 0


@needs_wrk
def test_a_gpu_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if NVIDIA_CARDS.is_dir():
        pytest.skip("this machine has an NVIDIA card")
    monkeypatch.setenv("QUINTET_RUNTIME", "cuda")
    asked = command(tmp_path, "--only", "image")
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stdout.strip().splitlines()) == 1
    assert "QUINTET_RUNTIME" in done.stdout
    assert not list(tmp_path.iterdir())


@needs_wrk
def test_what_was_tuned_is_what_the_service_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "quintet.env"
    choice = Choice({"workers": 1, "lanes": 2, "threads": 0}).with_policies("max_batch", {"digit": 16})
    write(file, choice.with_policies("batch_window_ms", {"digit": 0.5}), MODELS_FOLDER)
    monkeypatch.setenv(SETTINGS_FILE, str(file))
    settings = read_settings()
    assert (settings.workers, settings.lanes, settings.threads) == (1, 2, 0)
    assert settings.policy("digit").max_batch == 16
    assert settings.policy("digit").batch_window_ms == 0.5


def test_tuning_finds_the_peak_of_a_machine_that_is_known() -> None:
    def measure(choice: Choice, models: Sequence[str]) -> dict[str, float]:
        # One that likes two lanes, and whose texts gain by a window; the rest is within noise.
        common = (
            100 * (1.2 if choice.whole["lanes"] == 2 else 1.0) * (1.01 if choice.whole["threads"] else 1.0)
        )
        window = {model: choice.policies.get(model, {}).get("batch_window_ms", 0) for model in models}
        return {
            model: common * (1.3 if model == "sentiment" and window[model] == 2 else 1) for model in models
        }

    start = Choice({"workers": 2, "lanes": 1, "threads": 0})
    found = search(measure, ["digit", "sentiment"], 2, start)
    assert found.whole == {"workers": 2, "lanes": 2, "threads": 0}
    assert {model: policy for model, policy in found.policies.items() if policy} == {
        "sentiment": {"batch_window_ms": 2.0}
    }


def test_a_gain_is_that_of_all_models_together() -> None:
    assert gain({"a": 20, "b": 5}, {"a": 10, "b": 10}) == pytest.approx(1.0)


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ProgramMissing, match="nghttp2-client"):
        require("h2load")


@pytest.mark.parametrize(
    "make", [Bare, lambda settings: Answering(DIGIT, settings)], ids=["bare", "answering"]
)
async def test_the_barest_servers_answer_as_people_are_answered(
    make: Callable[[Settings], Callable[[Scope, Receive, Send], Awaitable[None]]],
) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": DIGIT.example["image"]}

    async def send(message: Message) -> None:
        sent.append(message)

    application = make(Settings(models=MODELS_FOLDER))
    await application({"type": "http", "path": "/digit", "headers": []}, receive, send)
    start, body = sent
    assert start["status"] == 200
    (prediction,) = json.loads(body["body"])["predictions"]
    assert prediction["label"] == "7"
