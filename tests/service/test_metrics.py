"""What Prometheus reads: all of it there, right with two workers, and no label from an open set."""

import shutil
import subprocess
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.data_plane import State
from service.errors import QuintetError
from service.models import MODELS
from tests.conftest import SHIPPED, QuintetServer

from .knocking import GrpcClient, http_client, infer_request, picture_request

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]

PROMISED = {
    "quintet_requests_total",
    "quintet_request_seconds_count",
    "quintet_inferences_total",
    "quintet_queue_seconds_count",
    "quintet_compute_seconds_count",
    "quintet_preprocess_seconds_count",
    "quintet_postprocess_seconds_count",
    "quintet_batch_size_count",
    "quintet_queue_depth",
    "quintet_in_flight",
    "quintet_rejected_total",
    "quintet_model_info",
    "quintet_workers",
    "quintet_worker_starts_total",
    "quintet_queue_places",
    "quintet_cpu_seconds_total",
    "quintet_memory_bytes",
    "quintet_broken_versions",
}

PROTOCOLS = {"rest", "open-inference-rest", "open-inference-grpc", "bentoml"}


def series_of(text: str) -> Series:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(series: Series, name: str, **labels: str) -> float:
    """The sum over all series of this name that have these labels."""
    return sum(
        value
        for (found, with_labels), value in series.items()
        if found == name and labels.items() <= dict(with_labels).items()
    )


@pytest.fixture
def visitors(quintet_server: QuintetServer) -> Iterator[list[httpx.Client]]:
    """Clients with a connection each, so that both workers meet some of them."""
    clients = [http_client(quintet_server) for _ in range(10)]
    yield clients
    for client in clients:
        client.close()


def read(client: httpx.Client) -> Series:
    response = client.get("/metrics")
    assert response.status_code == 200
    return series_of(response.text)


def test_all_that_the_contract_names_is_there(
    http: httpx.Client, grpc_client: GrpcClient, digit_png: bytes
) -> None:
    assert http.post("/digit", content=digit_png).status_code == 200
    assert http.post("/digit", content=bytes(17 * 2**20)).status_code == 413
    grpc_client.call("ModelInfer", picture_request(digit_png))
    series = read(http)
    assert {name for name, _ in series} >= PROMISED
    for protocol in ("rest", "open-inference-grpc"):
        assert value(series, "quintet_requests_total", protocol=protocol, outcome="ok") > 0
    assert value(series, "quintet_rejected_total", reason="body_too_large") > 0


def test_every_request_is_seen_by_whichever_worker_is_asked(
    visitors: list[httpx.Client], grpc_client: GrpcClient, digit_png: bytes
) -> None:
    before = read(visitors[0])
    for client in visitors * 4:
        assert client.post("/digit", content=digit_png).status_code == 200
        assert client.post("/digit", content=b"no picture").status_code == 400
    for _ in range(7):
        grpc_client.call("ModelInfer", picture_request(digit_png, digit_png))
    for client in visitors:
        after = read(client)
        grown = {
            name: value(after, name, **labels) - value(before, name, **labels)
            for name, labels in [
                ("quintet_requests_total", {"model": "digit", "protocol": "rest", "outcome": "ok"}),
                ("quintet_request_seconds_count", {"model": "digit", "protocol": "rest"}),
                ("quintet_preprocess_seconds_count", {"model": "digit"}),
                ("quintet_queue_seconds_count", {"model": "digit"}),
                ("quintet_batch_size_sum", {"model": "digit"}),
                ("quintet_inferences_total", {"model": "digit"}),
            ]
        }
        assert grown == {
            "quintet_requests_total": 40,
            "quintet_request_seconds_count": 80,
            "quintet_preprocess_seconds_count": 47,
            "quintet_queue_seconds_count": 47,
            "quintet_batch_size_sum": 54,
            "quintet_inferences_total": 54,
        }
        refused = {"model": "digit", "protocol": "rest", "outcome": "400"}
        assert value(after, "quintet_requests_total", **refused) == 40 + value(
            before, "quintet_requests_total", **refused
        )


def test_both_workers_take_part(quintet_server: QuintetServer, http: httpx.Client) -> None:
    """Or the test before would not have shown much."""
    series = read(http)
    for model in SHIPPED:
        assert value(series, "quintet_model_info", model=model) >= len(quintet_server.workers()) == 2


def test_paths_and_names_of_strangers_make_no_series(http: httpx.Client, grpc_client: GrpcClient) -> None:
    def stray(word: str) -> None:
        http.get(f"/{word}")
        http.post(f"/digit/{word}")
        http.request(word.upper(), "/digit")
        http.get(f"/v2/{word}")
        http.get(f"/v2/models/{word}")
        http.post(f"/v2/models/{word}/infer", content=b"{}")
        http.post(f"/v2/models/digit/versions/{word}/infer", content=b"{}")
        grpc_client.refusal("ModelInfer", infer_request(model=word))
        grpc_client.refusal("ModelInfer", infer_request(version=word))

    stray("first")
    before = read(http)
    for number in range(20):
        stray(f"word{number}")
    after = read(http)
    assert set(after) == set(before)
    assert "word" not in str(after.keys())


def test_labels_come_from_closed_sets(http: httpx.Client) -> None:
    kinds = [QuintetError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    allowed = {
        "model": {*MODELS, "none"},
        "protocol": PROTOCOLS,
        "outcome": {"ok", *(str(int(kind.status)) for kind in kinds)},
        "state": {state.value for state in State},
        "reason": {kind.rejection for kind in kinds if kind.rejection},
    }
    seen = set()
    for _, labels in read(http):
        for name, text in labels:
            if name in allowed:
                assert text in allowed[name]
                seen.add(name)
            else:
                assert name in {"version", "le", "precision", "provider", "sha256"}
            if name == "version":
                assert text == "none" or text.isdigit()
    assert seen == set(allowed)


def test_histograms_add_up(http: httpx.Client, digit_png: bytes) -> None:
    assert http.post("/digit", content=digit_png).status_code == 200
    series = read(http)
    buckets: dict[tuple[str, tuple[tuple[str, str], ...]], list[tuple[float, float]]] = {}
    for (name, labels), count in series.items():
        if name.endswith("_bucket"):
            bound = float(dict(labels)["le"])
            others = tuple(label for label in labels if label[0] != "le")
            buckets.setdefault((name.removesuffix("_bucket"), others), []).append((bound, count))
    assert {name for name, _ in buckets} == {
        name.removesuffix("_count") for name in PROMISED if name.endswith("_count")
    }
    for (name, labels), pairs in buckets.items():
        counts = [count for _, count in sorted(pairs)]
        assert counts == sorted(counts)
        assert max(pairs)[0] == float("inf")
        assert counts[-1] == series[f"{name}_count", labels]


def test_the_format_is_prometheus_own(http: httpx.Client) -> None:
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(response.text))
    assert all(family.documentation and family.type != "unknown" for family in families)
    # Prometheus' own tool is stricter; it is asked where it is installed.
    promtool = shutil.which("promtool")
    if promtool:
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=response.text, capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stderr
