"""All that can be set, each from an environment variable `QUINTET_<NAME>`; the defaults work on a laptop."""

import os
from pathlib import Path

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

MEBIBYTE = 1024 * 1024


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
    workers: int = Field(os.cpu_count() or 1, ge=1, le=256, description="server processes")
    grpc_host: str = Field("0.0.0.0", description="address that the gRPC door listens on")
    grpc_port: int = Field(3001, ge=0, le=65535, description="port of the gRPC door; 0 closes it")

    queue_size: int = Field(1024, ge=1, description="inputs that may wait for one model, in each worker")
    max_batch: int = Field(64, ge=1, le=4096, description="inputs that run together at the most")
    max_inputs: int = Field(256, ge=1, description="inputs in one request at the most")
    batch_window_ms: float = Field(0, ge=0, le=1000, description="how long a batch may wait for company")
    inline_ms: float = Field(1.0, ge=0, description="a batch expected to take longer leaves the event loop")
    lanes: int = Field(1, ge=1, le=64, description="batches that run at the same time, in each worker")

    max_body_bytes: int = Field(16 * MEBIBYTE, ge=1, description="one body, also once decompressed")
    max_buffered_bytes: int = Field(256 * MEBIBYTE, ge=1, description="all bodies held at one time, together")
    max_requests: int = Field(1024, ge=1, description="requests under way at one time, in each worker")

    drain_seconds: float = Field(1.0, ge=0, description="how long /readyz says 503 before the doors close")
    grace_seconds: float = Field(20.0, ge=0, description="how long accepted work may take after that")

    api_keys: tuple[SecretStr, ...] = Field((), description='keys of callers, as JSON: ["…"]; none: open')
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="least level logged")


def read_settings() -> Settings:
    """The settings of this environment.

    Raises:
        SystemExit: one of them cannot be; the sentence says which, and why.
    """
    try:
        return Settings()
    except ValidationError as error:
        wrong = [f"QUINTET_{str(one['loc'][0]).upper()}: {one['msg']}" for one in error.errors()]
        raise SystemExit(f"quintet: {'; '.join(wrong)}.") from None
    except SettingsError as error:
        raise SystemExit(f'quintet: {error}; a list is written as JSON: ["…"].') from None
