"""The three dashboards as code: `python deploy/grafana/dashboards.py` writes the JSON that Grafana reads.

Each panel says in its description what to make of it. The first dashboard answers "is it us or the
traffic?", the second which model, the third whether the GPU is the limit.
"""

import json
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).with_name("dashboards")
WIDTH: Final = 24
"""Columns of Grafana's grid."""

OF_JOB: Final = 'job=~"$job"'
OF_MODEL: Final = 'job=~"$job", model=~"$model"'
OF_GPU: Final = 'job=~"$job"'
TIME: Final = "$__rate_interval"

Panel = dict[str, Any]


def _panel(kind: str, title: str, words: str, queries: dict[str, str], width: int, height: int) -> Panel:
    """A panel; `queries` are PromQL by their legend."""
    return {
        "type": kind,
        "title": title,
        "description": words,
        "datasource": {"type": "prometheus", "uid": "prometheus"},
        "gridPos": {"w": width, "h": height, "x": 0, "y": 0},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": query, "legendFormat": legend}
            for number, (legend, query) in enumerate(queries.items())
        ],
        "fieldConfig": {"defaults": {}, "overrides": []},
        "options": {},
    }


def number(
    title: str, words: str, query: str, unit: str, thresholds: dict[float, str] | None = None
) -> Panel:
    """One number, coloured from each of its thresholds on."""
    panel = _panel("stat", title, words, {"": query}, 4, 4)
    steps = [{"color": "green", "value": None}]
    steps += [{"color": colour, "value": value} for value, colour in (thresholds or {}).items()]
    panel["fieldConfig"]["defaults"] = {"unit": unit, "thresholds": {"mode": "absolute", "steps": steps}}
    panel["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value"}
    return panel


def lines(title: str, words: str, queries: dict[str, str], unit: str, *, stacked: bool = False) -> Panel:
    """Numbers over time."""
    panel = _panel("timeseries", title, words, queries, 12, 8)
    custom: dict[str, Any] = {"fillOpacity": 30 if stacked else 8, "showPoints": "never"}
    if stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    panel["fieldConfig"]["defaults"] = {"unit": unit, "min": 0, "custom": custom}
    panel["options"] = {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi"},
    }
    return panel


def heat_map(title: str, words: str, histogram: str, labels: str, unit: str) -> Panel:
    """How many fell into which bucket, over time."""
    query = f"sum by (le) (increase({histogram}_bucket{{{labels}}}[{TIME}]))"
    panel = _panel("heatmap", title, words, {"{{le}}": query}, 12, 8)
    panel["targets"][0]["format"] = "heatmap"
    panel["options"] = {
        "calculate": False,
        "yAxis": {"unit": unit},
        "color": {"mode": "scheme", "scheme": "Oranges"},
        "cellGap": 1,
        "tooltip": {"show": True},
    }
    return panel


def table(title: str, words: str, query: str) -> Panel:
    """The labels of a query's series, as rows."""
    panel = _panel("table", title, words, {"": query}, 24, 7)
    panel["targets"][0] |= {"format": "table", "instant": True}
    panel["transformations"] = [{"id": "organize", "options": {"excludeByName": {"Time": True}}}]
    return panel


def per_second(counter: str, labels: str, by: str = "job") -> str:
    """How fast a counter grows, by these labels."""
    return f"sum by ({by}) (rate({counter}{{{labels}}}[{TIME}]))"


def mean(histogram: str, labels: str, by: str) -> str:
    """The mean of what a histogram counted."""
    return (
        f"{per_second(f'{histogram}_sum', labels, by)} / ({per_second(f'{histogram}_count', labels, by)} > 0)"
    )


def quantile(share: float, histogram: str, labels: str, by: str = "le") -> str:
    """The value that this share stays below."""
    return f"histogram_quantile({share}, sum by ({by}) (rate({histogram}_bucket{{{labels}}}[{TIME}])))"


def service() -> list[Panel]:
    """Is it us or the traffic?"""
    all_rate = f"rate(quintet_requests_total{{{OF_JOB}}}[{TIME}])"
    failed_rate = f'rate(quintet_requests_total{{{OF_JOB}, outcome=~"5.."}}[{TIME}])'
    every = f"sum({all_rate})"
    # Where nothing failed there is no such series; nought of all is nought.
    failed = f"sum({failed_rate} or 0 * {all_rate})"
    return [
        number("Requests", "All doors, whatever the answer.", every, "reqps"),
        number(
            "Our failures",
            "Share of requests answered 5xx. The budget is 0.1 % a month.",
            f"{failed} / ({every} > 0)",
            "percentunit",
            {0.001: "orange", 0.0144: "red"},
        ),
        number(
            "Answered within, 99 of 100",
            "From the first byte of a request to its answer.",
            quantile(0.99, "quintet_request_seconds", f'{OF_JOB}, outcome="ok"'),
            "s",
        ),
        number(
            "Workers ready",
            "Workers that take requests, on all servers.",
            f'sum(quintet_workers{{{OF_JOB}, state="ready"}})',
            "short",
        ),
        number(
            "Queues filled",
            "Inputs that wait, as a share of those that may. Near 1, work is refused.",
            f"max(sum by (model) (quintet_queue_depth{{{OF_JOB}}}) "
            f"/ (sum by (model) (quintet_queue_places{{{OF_JOB}}}) > 0))",
            "percentunit",
            {0.5: "orange", 0.9: "red"},
        ),
        number(
            "Cores busy",
            "Processor time of the workers. At the number of cores it has, the service is at its limit.",
            f"sum(rate(quintet_cpu_seconds_total{{{OF_JOB}}}[{TIME}]))",
            "short",
        ),
        lines(
            "Traffic by model",
            "More of it, or of another kind? Then it is the traffic.",
            {"{{model}}": per_second("quintet_requests_total", OF_JOB, "model")},
            "reqps",
            stacked=True,
        ),
        lines(
            "Traffic by door",
            "REST for people, the Open Inference Protocol over REST and gRPC, BentoML's own face.",
            {"{{protocol}}": per_second("quintet_requests_total", OF_JOB, "protocol")},
            "reqps",
            stacked=True,
        ),
        lines(
            "Outcomes other than ok",
            "4xx is the callers' doing, 429 too much of it, 5xx is ours.",
            {"{{outcome}}": per_second("quintet_requests_total", f'{OF_JOB}, outcome!="ok"', "outcome")},
            "reqps",
            stacked=True,
        ),
        lines(
            "Refused before any work, by reason",
            "queue_full and unavailable are ours to mend; the others say what callers send.",
            {"{{reason}}": per_second("quintet_rejected_total", OF_JOB, "reason")},
            "reqps",
            stacked=True,
        ),
        heat_map(
            "Latency of good answers",
            "A second band above the first is a second kind of request, or a queue.",
            "quintet_request_seconds",
            f'{OF_JOB}, outcome="ok"',
            "s",
        ),
        lines(
            "Latency of good answers, by share",
            "If these rise with the traffic, it waits; if alone, it computes longer.",
            {
                f"{share:.0%}": quantile(share, "quintet_request_seconds", f'{OF_JOB}, outcome="ok"')
                for share in (0.5, 0.95, 0.99)
            },
            "s",
        ),
        lines(
            "Waiting against computing, mean",
            "Waiting above computing: too few workers for this traffic. "
            "Computing alone: the network or the machine.",
            {
                "waiting for a batch": mean("quintet_queue_seconds", OF_JOB, "job"),
                "running a batch": mean("quintet_compute_seconds", OF_JOB, "job"),
            },
            "s",
        ),
        lines(
            "Requests under way",
            "Each worker lets in QUINTET_MAX_REQUESTS.",
            {"{{instance}}": f"sum by (instance) (quintet_in_flight{{{OF_JOB}}})"},
            "short",
            stacked=True,
        ),
        lines(
            "Memory",
            "Resident, all workers of a server together. A floor that rises is a leak.",
            {"{{instance}}": f"sum by (instance) (quintet_memory_bytes{{{OF_JOB}}})"},
            "bytes",
        ),
        lines(
            "Workers started, per second",
            "Each beyond the first of a start took a dead one's place.",
            {"{{instance}}": per_second("quintet_worker_starts_total", OF_JOB, "instance")},
            "short",
        ),
    ]


def models() -> list[Panel]:
    """Which model, which version, and where its time goes."""
    return [
        table(
            "Versions in use",
            "The value is the number of workers that serve it.",
            f"sum by (model, version, precision, provider) (quintet_model_info{{{OF_MODEL}}} > 0)",
        ),
        lines(
            "Inputs answered",
            "A request may hold many.",
            {"{{model}} {{version}}": per_second("quintet_inferences_total", OF_MODEL, "model, version")},
            "ops",
            stacked=True,
        ),
        lines(
            "Versions that cannot be loaded",
            "The log says why; what was loaded serves on.",
            {"{{model}}": f"max by (model) (quintet_broken_versions{{{OF_MODEL}}})"},
            "short",
        ),
        *(
            lines(
                title,
                words,
                {"{{model}}": quantile(0.95, f"quintet_{step}_seconds", OF_MODEL, "model, le")},
                "s",
            )
            for step, title, words in (
                ("preprocess", "Preparing, 95 of 100 below", "A request's inputs to tensors."),
                ("queue", "Waiting, 95 of 100 below", "Until the batch that it rides in starts."),
                ("compute", "Computing, 95 of 100 below", "A whole batch in the network."),
                ("postprocess", "Answering, 95 of 100 below", "Rows of the network to answers."),
            )
        ),
        heat_map(
            "Batch sizes",
            "Ones only: nothing to gain by batching now.",
            "quintet_batch_size",
            OF_MODEL,
            "short",
        ),
        lines(
            "Batch size, mean",
            "Grows with the traffic, as it should.",
            {"{{model}}": mean("quintet_batch_size", OF_MODEL, "model")},
            "short",
        ),
        lines(
            "Inputs that wait",
            "Refused from QUINTET_QUEUE_SIZE on, in each worker.",
            {"{{model}}": f"sum by (model) (quintet_queue_depth{{{OF_MODEL}}})"},
            "short",
        ),
        lines(
            "Lanes' time by model",
            "Seconds of network in a second: who has the machine.",
            {"{{model}}": per_second("quintet_compute_seconds_sum", OF_MODEL, "model")},
            "short",
            stacked=True,
        ),
    ]


def gpu() -> list[Panel]:
    """Is the GPU the limit? Empty where there is none."""
    by = "{{instance}} {{gpu}}"
    return [
        lines(
            "Busy",
            "Share of time in which something ran. Near 1 with queues that fill: it is the limit.",
            {by: f"quintet_gpu_busy_ratio{{{OF_GPU}}}"},
            "percentunit",
        ),
        lines(
            "Memory taken",
            "By whomever, of what there is. QUINTET_GPU_MEMORY_MB caps our part.",
            {by: f"quintet_gpu_memory_used_bytes{{{OF_GPU}}} / quintet_gpu_memory_bytes{{{OF_GPU}}}"},
            "percentunit",
        ),
        lines(
            "Temperature",
            "It slows down above 85 or so.",
            {by: f"quintet_gpu_celsius{{{OF_GPU}}}"},
            "celsius",
        ),
        lines("Power", "", {by: f"quintet_gpu_watts{{{OF_GPU}}}"}, "watt"),
        lines(
            "Inputs answered by a GPU",
            "Of the models that run there; the rest runs on a CPU.",
            {
                "{{model}}": f"sum by (model) (rate(quintet_inferences_total{{{OF_GPU}}}[{TIME}]) "
                "and on (job, instance, model, version) "
                'quintet_model_info{provider!="CPUExecutionProvider"} > 0)'
            },
            "ops",
        ),
    ]


def _placed(panels: list[Panel]) -> list[Panel]:
    """Side by side from left to right, row under row."""
    x = y = row_height = 0
    for place, panel in enumerate(panels, 1):
        size = panel["gridPos"]
        if x + size["w"] > WIDTH:
            x, y, row_height = 0, y + row_height, 0
        panel["id"] = place
        size["x"], size["y"] = x, y
        x, row_height = x + size["w"], max(row_height, size["h"])
    return panels


def _variable(name: str, of: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "prometheus"},
        "query": {"query": f"label_values({of}, {name})", "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard(name: str, panels: list[Panel]) -> dict[str, Any]:
    """A whole dashboard."""
    variables = [_variable("job", "quintet_workers")]
    if name == "models":
        variables.append(_variable("model", "quintet_model_info"))
    return {
        "uid": f"quintet-{name}",
        "title": f"Quintet: {name}",
        "tags": ["quintet"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [{"type": "dashboards", "title": "Quintet", "tags": ["quintet"], "keepTime": True}],
        "templating": {"list": variables},
        "annotations": {"list": []},
        "panels": _placed(panels),
    }


DASHBOARDS: Final = {"service": service, "models": models, "gpu": gpu}


def as_text(name: str) -> str:
    """The JSON file of a dashboard."""
    return json.dumps(dashboard(name, DASHBOARDS[name]()), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(as_text(name), encoding="utf-8")
