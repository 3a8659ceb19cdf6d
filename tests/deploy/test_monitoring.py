"""Dashboards and alerts against a real Prometheus that reads a real service under load."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import pytest
import yaml

from load_tests.servers import free_ports
from service.metrics import FAMILIES, PUBLIC
from tests.conftest import ROOT, QuintetServer, StartQuintet
from tests.service.knocking import GrpcClient, picture_request

from .conftest import Load

DEPLOY = ROOT / "deploy"
RULES = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}
DASHBOARDS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
}
PANELS = {
    f"{name}: {panel['title']}, {target['legendFormat']}": target["expr"]
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    for target in panel["targets"]
}
WAIT_SECONDS = 60.0

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="Prometheus is not installed here: Debian's package is called prometheus",
)


# ---- as they are written ----


@needs_prometheus
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["check", "config", "prometheus.yml"], id="configuration"),
        pytest.param(["check", "rules", "rules.yml"], id="rules"),
        pytest.param(["test", "rules", "rules.test.yml"], id="unit tests of the rules"),
    ],
)
def test_promtool_agrees(arguments: list[str]) -> None:
    ran = subprocess.run(["promtool", *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_alert_has_a_unit_test_and_a_runbook() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus" / "rules.test.yml").read_text())["tests"]
    fired = {
        one["alertname"] for test in tests for one in test.get("alert_rule_test", ()) if one["exp_alerts"]
    }
    assert fired == set(ALERTS)
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "runbooks.md").read_text(), re.MULTILINE)
    anchors = {f"docs/runbooks.md#{heading.lower().replace(' ', '-')}" for heading in headings}
    assert {rule["annotations"]["runbook"] for rule in ALERTS.values()} == anchors
    assert {rule["labels"]["severity"] for rule in ALERTS.values()} == {"page", "ticket"}


def test_the_dashboards_are_those_of_their_code(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "grafana", tmp_path / "grafana")
    subprocess.run([sys.executable, tmp_path / "grafana" / "dashboards.py"], check=True)
    for name in DASHBOARDS:
        path = Path("grafana") / "dashboards" / f"{name}.json"
        assert (tmp_path / path).read_text() == (DEPLOY / path).read_text(), (
            "run deploy/grafana/dashboards.py"
        )


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_one_that_grafana_can_show(name: str) -> None:
    dashboard = DASHBOARDS[name]
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())
    known = {source["uid"] for source in sources["datasources"]}
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, f"{panel['title']} covers another panel"
        taken |= cells
        assert panel["datasource"]["uid"] in known
        assert panel["type"] in {"stat", "timeseries", "heatmap", "table"}
        assert panel["targets"]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$(\w+)", json.dumps([panel["targets"] for panel in panels])))
    assert used <= variables | {"__rate_interval"}


def test_the_list_of_metrics_is_whole() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    for name in PUBLIC:
        kind, _, labels, _ = FAMILIES[name]
        whole = f"{name}_total" if kind == "counter" else name
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{whole}` ")]
        assert [cell.strip() for cell in row.split("|")[2:4]] == [kind, ", ".join(labels)]


def test_the_dashboards_and_alerts_know_no_other_names() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    known = set(re.findall(r"`(quintet_\w+)`", text))
    asked = re.findall(r"\bquintet_\w+", " ".join([*PANELS.values(), *map(str, ALERTS.values())]))
    assert len(asked) > 30
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in asked} <= known


# ---- as they are evaluated ----


class Prometheus:
    """A real one, which reads one service every second under the rules that ship."""

    def __init__(self, folder: Path, target: str) -> None:
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in config["rule_files"]]
        (job,) = config["scrape_configs"]
        job["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (self._port,) = free_ports(1)
        self._log = (folder / "log").open("wb")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
            ],
            stdout=self._log,
            stderr=self._log,
        )
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{self._port}/api/v1", trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def ask(self, path: str, **parameters: str) -> Any:
        answer = self._client.get(path, params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The value of each series that an expression gives now."""
        return {
            tuple(sorted(one["metric"].items())): float(one["value"][1])
            for one in self.ask("/query", query=expression)["result"]
        }

    def number(self, expression: str) -> float:
        (value,) = self.query(expression).values()
        return value

    def wait_for_a_look(self) -> None:
        """Until it has read all that has happened before this call."""
        now, give_up = time.time(), time.monotonic() + WAIT_SECONDS
        while True:
            try:
                looked = self.query('timestamp(up{job="quintet"})')
            except httpx.TransportError:
                looked = {}
            # Gauges may be a moment older than what they are read with.
            if looked and min(looked.values()) > now + 1:
                return
            assert time.monotonic() < give_up, "Prometheus does not read the service"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def watched(start_quintet: StartQuintet, digit_only: Path) -> Iterator[QuintetServer]:
    with start_quintet(models=digit_only, queue_size=64) as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(watched: QuintetServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with Prometheus(tmp_path_factory.mktemp("prometheus"), watched.http_address) as running:
        yield running


@pytest.fixture(scope="module")
def load(watched: QuintetServer, prometheus: Prometheus, digit_png: bytes) -> Load:
    """The counts of all that this module's service was ever asked over REST."""
    prometheus.wait_for_a_look()
    return Load(watched.http_url, digit_png)


def send_all_kinds(server: QuintetServer, load: Load, picture: bytes) -> None:
    """Right requests, and one of each kind that is refused or wrong."""
    with httpx.Client(base_url=server.http_url, trust_env=False, timeout=30) as client:
        for content in (b"no picture", bytes(17 * 2**20)):
            load.seen[str(client.post("/digit", content=content).status_code)] += 1
        # More than the queue can ever hold.
        files = [("images", ("digit.png", picture, "image/png"))] * 100
        load.seen[str(client.post("/digit", files=files).status_code)] += 1


def counted(prometheus: Prometheus) -> dict[str, float]:
    """What Prometheus saw answered over REST, by outcome."""
    sums = prometheus.query('sum by (outcome) (quintet_requests_total{protocol="rest"})')
    return {dict(labels)["outcome"]: value for labels, value in sums.items()}


@needs_prometheus
async def test_prometheus_counts_what_the_callers_counted_with_two_workers_and_after_one_was_killed(
    watched: QuintetServer, prometheus: Prometheus, load: Load, digit_png: bytes
) -> None:
    await load.send(400)
    send_all_kinds(watched, load, digit_png)
    prometheus.wait_for_a_look()
    assert set(load.seen) == {"ok", "400", "413", "429"}
    assert counted(prometheus) == load.seen
    assert prometheus.number("sum(quintet_inferences_total)") == load.seen["ok"]
    assert prometheus.number('quintet_workers{state="ready"}') == 2
    assert prometheus.number("quintet_worker_starts_total") == 2

    watched.workers()[0].kill()
    wait_for_another_worker(watched, 3)
    await load.send(400)
    send_all_kinds(watched, load, digit_png)
    prometheus.wait_for_a_look()
    assert counted(prometheus) == load.seen
    assert load.seen["ok"] == 800
    assert prometheus.number("sum(quintet_request_seconds_count{protocol='rest'})") == load.seen.total()
    assert prometheus.number("sum(quintet_batch_size_sum)") == load.seen["ok"]
    assert prometheus.number('quintet_workers{state="ready"}') == 2
    assert prometheus.number("quintet_worker_starts_total") == 3
    assert prometheus.number("quintet_in_flight") == 0


@needs_prometheus
async def test_every_panel_and_every_alert_can_be_evaluated(
    watched: QuintetServer, prometheus: Prometheus, load: Load, digit_png: bytes
) -> None:
    with GrpcClient(watched.grpc_address) as client:
        for _ in range(20):
            client.call("ModelInfer", picture_request(digit_png))
    await load.send(400)
    send_all_kinds(watched, load, digit_png)
    prometheus.wait_for_a_look()
    prometheus.wait_for_a_look()
    has_gpu = bool(prometheus.query("quintet_gpu_memory_bytes"))
    for title, expression in PANELS.items():
        # Grafana's variables, as it fills them in for all jobs and models.
        filled = expression.replace("$__rate_interval", "1m").replace("$job", ".+").replace("$model", ".+")
        found = prometheus.query(filled)
        # Without a GPU, the GPU's dashboard is empty; all else must show something.
        assert bool(found) == (has_gpu or not title.startswith("gpu: ")), f"{title}: {filled}"
    healths = {
        rule["name"]: rule["health"]
        for group in prometheus.ask("/rules")["groups"]
        for rule in group["rules"]
    }
    assert set(healths) >= set(ALERTS)
    assert set(healths.values()) == {"ok"}
    for name, rule in ALERTS.items():
        # As if every threshold were passed and the service were old enough: what is compared must be there.
        passed = re.sub(" (>|==) ", " >= -1 + 0 * ", rule["expr"]).replace(" offset 6h", "")
        assert bool(prometheus.query(passed)) == (has_gpu or "gpu" not in rule["expr"]), f"{name}: {passed}"


def wait_for_another_worker(server: QuintetServer, count: int) -> None:
    """Until so many workers have been ready, dead ones among them."""
    give_up = time.monotonic() + 120
    while server.log_text().count('"event": "ready"') < count:
        assert time.monotonic() < give_up, server.log_text()
        time.sleep(0.1)


# ---- a worker killed under load ----


@needs_prometheus
async def test_a_worker_that_is_killed_takes_only_what_it_had_under_way(
    watched: QuintetServer, prometheus: Prometheus, load: Load
) -> None:
    ready = watched.log_text().count('"event": "ready"')
    before = load.seen.copy()
    callers = 8
    asking = asyncio.create_task(load.send(1500, callers))
    while load.seen["ok"] - before["ok"] < 300:
        await asyncio.sleep(0.01)
    victim: psutil.Process = watched.workers()[0]
    victim.kill()
    await asking
    lost = load.seen[Load.LOST]
    assert load.seen.keys() <= {"ok", "400", "413", "429", Load.LOST}
    assert load.seen["ok"] - before["ok"] == 1500 - lost
    # Each caller has one request under way at a time.
    assert lost <= callers
    await asyncio.to_thread(wait_for_another_worker, watched, ready + 1)
    assert victim.pid not in [worker.pid for worker in watched.workers()]
    assert len(watched.workers()) == 2
    await load.send(200)
    assert load.seen[Load.LOST] == lost
    prometheus.wait_for_a_look()
    # What the dead worker had under way it had counted or not; all else is exact.
    assert load.seen["ok"] <= counted(prometheus)["ok"] <= load.seen["ok"] + lost
