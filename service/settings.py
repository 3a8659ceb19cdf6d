"""All that can be set, each from an environment variable `QUINTET_<NAME>`; the defaults work on a laptop."""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple, Self

from dotenv import dotenv_values
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from service.models import MODELS

MEBIBYTE = 1024 * 1024

OTHERS: Final = frozenset(
    f"QUINTET_{name}"
    for name in ("BROWSER", "CA_FILE", "DATA", "KEY", "PEERS", "SETTINGS", "SHARED_FOLDER", "URL")
)
"""Variables of the same family that are not the service's settings: the client's, the trainer's, its own."""

KUBERNETES: Final = re.compile(
    r"QUINTET_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT_\d+_(TCP|UDP|SCTP)\w*)", re.ASCII
)
"""Variables that Kubernetes sets for a Service named quintet, in the pods beside it."""

SETTINGS_FILE: Final = "QUINTET_SETTINGS"
"""Names a file of settings, as lines `QUINTET_<NAME>=value`; empty for none."""

CPU_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")


def cores() -> int:
    """How many cores this process may use: those it is bound to, of those its container was given."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(1, min(there, int(quota) // int(period)))
    except (OSError, ValueError):
        # No such file outside of cgroups, and the word "max" where there is no limit.
        return there


class Policy(BaseModel):
    """How the requests for one model are batched; what is not said is as for all models."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queue_size: int | None = Field(None, ge=1)
    max_batch: int | None = Field(None, ge=1, le=4096)
    max_tokens: int | None = Field(None, ge=1)
    batch_window_ms: float | None = Field(None, ge=0, le=1000)
    batch_ms: float | None = Field(None, gt=0)


class WholePolicy(NamedTuple):
    """How the requests for one model are batched."""

    queue_size: int
    max_batch: int
    max_tokens: int
    batch_window_ms: float
    batch_ms: float


class Settings(BaseSettings):
    """What an operator may change, checked at start and frozen after.

    `QUINTET_QUEUE_SIZE=64 make serve` sets `queue_size`. Bytes, seconds and
    milliseconds are said in the names.
    """

    model_config = SettingsConfigDict(env_prefix="QUINTET_", frozen=True)

    models: Path = Field(Path(__file__).resolve().parents[1] / "models", description="the model repository")
    page: Path = Field(
        Path(__file__).resolve().parents[1] / "clients" / "web", description="the page to try them on"
    )
    workers: int = Field(default_factory=cores, ge=1, le=256, description="server processes")
    grpc_host: str = Field("0.0.0.0", description="address that the gRPC door listens on")
    grpc_port: int = Field(3001, ge=0, le=65535, description="port of the gRPC door; 0 closes it")

    queue_size: int = Field(1024, ge=1, description="inputs that may wait for one model, in each worker")
    max_batch: int = Field(64, ge=1, le=4096, description="inputs that run together at the most")
    max_inputs: int = Field(256, ge=1, description="inputs in one request at the most")
    max_tokens: int = Field(8192, ge=1, description="tokens of texts that run together, with their padding")
    batch_window_ms: float = Field(0, ge=0, le=1000, description="how long a batch may wait for company")
    batch_ms: float = Field(100.0, gt=0, description="no batch is so large that it should take longer")
    inline_ms: float = Field(
        8.0,
        ge=0,
        description="no batch on the event loop takes longer; where eight inputs would, all leave it",
    )
    lanes: int = Field(1, ge=1, le=64, description="batches that run at the same time, in each worker")
    threads: int = Field(
        0, ge=0, le=256, description="threads inside a run; 0: what the model's card found best"
    )

    runtime: Literal["auto", "cpu", "cuda", "tensorrt"] = Field("auto", description="what networks run on")
    precision: Literal["auto", "fp32", "fp16", "int8"] = Field(
        "auto", description="of each model's files; auto: the best verified one for what it runs on"
    )
    gpu: int = Field(0, ge=0, description="which GPU, of several")
    gpu_memory_mb: int = Field(0, ge=0, description="what ONNX Runtime may take of its memory; 0: all")
    gpu_graphs: bool = Field(True, description="whether a GPU replays whole runs (CUDA graphs)")
    engines: Path = Field(
        Path("~/.cache/quintet/engines").expanduser(), description="where TensorRT keeps its engines"
    )
    policies: dict[str, Policy] = Field(
        {}, description='of these, other values for single models, as JSON: {"sentiment": {"max_batch": 16}}'
    )
    watch_seconds: float = Field(2.0, ge=0, description="how often the repository is looked at; 0: never")

    max_body_bytes: int = Field(16 * MEBIBYTE, ge=1, description="one body, also once decompressed")
    max_buffered_bytes: int = Field(256 * MEBIBYTE, ge=1, description="all bodies held at one time, together")
    max_requests: int = Field(1024, ge=1, description="requests under way at one time, in each worker")

    drain_seconds: float = Field(1.0, ge=0, description="how long /readyz says 503 before the doors close")
    grace_seconds: float = Field(20.0, ge=0, description="how long accepted work may take after that")

    api_keys: tuple[SecretStr, ...] = Field(
        (), description='keys of callers or their digests, as JSON: ["…", "sha256:…"]; none: open'
    )
    admin_key: SecretStr | None = Field(
        None, description="key, or digest, for loading and unloading; none: off"
    )
    tls_certificate: Path | None = Field(None, description="PEM file; with a key, both doors speak TLS")
    tls_key: Path | None = Field(None, description="its private key, a PEM file without a passphrase")
    cors_origins: tuple[str, ...] = Field(
        (), description='pages of other origins that may ask, as JSON: ["https://example.org"]; none: none'
    )
    access_log_share: float = Field(
        0.0, ge=0, le=1, description="of all requests, the share that the log tells of; never what they held"
    )
    trace_url: str | None = Field(
        None,
        pattern="^https?://",
        description="OTLP receiver of spans: http://localhost:4318; none: off",
    )
    trace_share: float = Field(
        1.0, ge=0, le=1, description="of the requests whose caller has not decided, the share that is traced"
    )
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="least level logged")

    @field_validator("policies")
    @classmethod
    def _name_only_models(cls, policies: dict[str, Policy]) -> dict[str, Policy]:
        unknown = set(policies) - set(MODELS)
        if unknown:
            raise ValueError(f"there is no model {min(unknown)}; there are {', '.join(MODELS)}")
        return policies

    @model_validator(mode="after")
    def _have_both_or_neither(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS takes both, QUINTET_TLS_CERTIFICATE and QUINTET_TLS_KEY")
        return self

    def policy(self, model: str) -> WholePolicy:
        """How the requests for one model are batched."""
        own = self.policies.get(model, Policy())
        said = {name: getattr(own, name) for name in WholePolicy._fields}
        return WholePolicy(
            **{name: getattr(self, name) if value is None else value for name, value in said.items()}
        )


def settings_file() -> Path | None:
    """The file that settings are read from beside the environment, there or not; None for none."""
    named = os.environ.get(SETTINGS_FILE)
    if named is None:
        return Path(__file__).resolve().parents[1] / "quintet.env"
    return Path(named) if named else None


def read_settings() -> Settings:
    """The settings of this environment, and of the file of settings where the environment says nothing.

    Raises:
        SystemExit: one of them cannot be, or a file that was named is not there; the sentence
            says which, and why.
    """
    file = settings_file()
    if file is not None and SETTINGS_FILE in os.environ and not file.is_file():
        raise SystemExit(f"quintet: {SETTINGS_FILE} names a file that is not there.")
    in_file = dotenv_values(file) if file is not None and file.is_file() else {}
    _refuse_unknown(in_file | os.environ)
    try:
        return Settings(_env_file=file)
    except ValidationError as error:
        # What concerns several of them together has no place of its own.
        wrong = [
            f"QUINTET_{str(one['loc'][0]).upper()}: {one['msg']}" if one["loc"] else one["msg"]
            for one in error.errors()
        ]
        raise SystemExit(f"quintet: {'; '.join(wrong)}.") from None
    except SettingsError as error:
        raise SystemExit(f'quintet: {error}; a list is written as JSON: ["…"].') from None


def _refuse_unknown(environment: Mapping[str, str | None]) -> None:
    """A misspelt setting would quietly be none.

    Raises:
        SystemExit: there is such a variable.
    """
    known = [f"QUINTET_{name.upper()}" for name in Settings.model_fields]
    for variable, value in sorted(environment.items()):
        name = variable.upper()
        # Kubernetes' QUINTET_PORT is an address; its others are known by their form.
        is_kubernetes = KUBERNETES.fullmatch(name) or (value or "").startswith(("tcp://", "udp://"))
        if name.startswith("QUINTET_") and name not in (*OTHERS, *known) and not is_kubernetes:
            close = difflib.get_close_matches(name, known, 1)
            advice = f"did you mean {close[0]}?" if close else "service/settings.py lists all there are."
            raise SystemExit(f"quintet: {variable}: there is no such setting; {advice}")
