"""Model versions that come, change and go while the service runs."""

import asyncio
import gc
import hashlib
import json
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from service.catalogue import READY, UNAVAILABLE, Catalogue, Entry
from service.commands import Command, Commands
from service.data_plane import PROTOCOLS
from service.lanes import Lanes, LoopTurns
from service.metrics import Board
from service.models.digit import DIGIT
from service.repository import RepositoryError
from service.settings import Settings
from tests.conftest import MODELS_FOLDER, QuintetServer, StartQuintet

from .knocking import GrpcClient, http_client, picture_request

SHIPPED = MODELS_FOLDER / "digit" / "2"


def add_version(models: Path, version: int, *, damaged: bool = False, network: bytes | None = None) -> Path:
    """A version of the digit model, put in its place in one move as the export does; `damaged` by a byte."""
    draft = models / "digit" / f".draft-{version}"
    shutil.copytree(SHIPPED, draft)
    card = json.loads((draft / "card.json").read_text())
    card["version"] = str(version)
    entry = card["files"]["fp32"]
    file = draft / entry["path"]
    if network is not None:
        file.write_bytes(network)
        entry |= {"bytes": len(network), "sha256": hashlib.sha256(network).hexdigest()}
    card["files"] = {"fp32": entry}
    (draft / "card.json").write_text(json.dumps(card))
    if damaged:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    place = models / "digit" / str(version)
    shutil.rmtree(place, ignore_errors=True)
    return draft.rename(place)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A repository with versions 1 and 2."""
    folder = tmp_path / "models"
    (folder / "digit").mkdir(parents=True)
    add_version(folder, 1)
    add_version(folder, 2)
    return folder


@pytest.fixture
def catalogue(models: Path, tmp_path: Path) -> Iterator[Catalogue]:
    lanes, board = Lanes(1), Board(tmp_path / "board")
    found = Catalogue(Settings(models=models), board, lanes, LoopTurns())
    found.load_all()
    yield found
    lanes.close()
    board.close()


def versions(catalogue: Catalogue) -> list[str]:
    return list(catalogue.models.get("digit", {}))


def look_twice(catalogue: Catalogue) -> None:
    catalogue.watch()
    catalogue.watch()


# ---- the catalogue itself ----


def test_all_versions_are_open_the_highest_last(catalogue: Catalogue) -> None:
    assert versions(catalogue) == ["1", "2"]
    assert catalogue.index() == [Entry("digit", "1", READY), Entry("digit", "2", READY)]


def test_nothing_is_opened_again_that_has_not_changed(catalogue: Catalogue) -> None:
    before = catalogue.models["digit"]
    look_twice(catalogue)
    assert catalogue.models["digit"] == before


def test_a_new_version_is_found_once_it_stands_still(catalogue: Catalogue, models: Path) -> None:
    add_version(models, 10)
    catalogue.watch()
    assert versions(catalogue) == ["1", "2"]
    catalogue.watch()
    assert versions(catalogue) == ["1", "2", "10"]


def test_a_version_that_is_taken_away_goes_and_the_others_stay(catalogue: Catalogue, models: Path) -> None:
    shutil.rmtree(models / "digit" / "2")
    catalogue.watch()
    assert versions(catalogue) == ["1"]


@pytest.mark.parametrize("gone", ["digit", ""], ids=["the model's folder", "the repository"])
def test_a_repository_that_is_gone_takes_nothing_with_it(
    catalogue: Catalogue, models: Path, gone: str
) -> None:
    shutil.rmtree(models / gone)
    look_twice(catalogue)
    assert versions(catalogue) == ["1", "2"]


@pytest.mark.parametrize(
    "broken", [{"damaged": True}, {"network": b"no network"}], ids=["altered", "no network at all"]
)
def test_a_broken_version_changes_nothing_but_the_index(
    catalogue: Catalogue, models: Path, broken: dict[str, Any]
) -> None:
    before = catalogue.models["digit"]
    add_version(models, 3, **broken)
    look_twice(catalogue)
    assert catalogue.models["digit"] == before
    *good, bad = catalogue.index()
    assert [entry.state for entry in good] == [READY, READY]
    assert (bad.model, bad.version, bad.state) == ("digit", "3", UNAVAILABLE)
    assert "could not be loaded" in bad.reason
    assert str(models) not in bad.reason
    # Mended, it serves.
    add_version(models, 3)
    look_twice(catalogue)
    assert versions(catalogue) == ["1", "2", "3"]
    assert all(entry.state == READY for entry in catalogue.index())


def test_a_version_that_breaks_serves_on_as_it_was(catalogue: Catalogue, models: Path) -> None:
    before = catalogue.models["digit"]["2"]
    add_version(models, 2, damaged=True)
    look_twice(catalogue)
    assert catalogue.models["digit"]["2"] is before
    assert catalogue.index()[1].state == READY
    assert "could not be loaded" in catalogue.index()[1].reason


def test_what_is_broken_is_not_tried_again_until_it_changes(
    catalogue: Catalogue, models: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    add_version(models, 3, damaged=True)
    for _ in range(3):
        look_twice(catalogue)
    said = capfd.readouterr()
    assert (said.out + said.err).count("cannot be loaded") == 1


def test_what_is_unloaded_stays_so_until_it_is_loaded(catalogue: Catalogue) -> None:
    catalogue.unload("digit")
    look_twice(catalogue)
    assert versions(catalogue) == []
    assert catalogue.index() == [Entry("digit", "", UNAVAILABLE, "It was unloaded.")]
    assert catalogue.load("digit") is None
    assert versions(catalogue) == ["1", "2"]


def test_loading_opens_everything_anew_and_the_old_is_gone_when_nobody_uses_it(catalogue: Catalogue) -> None:
    taken = catalogue.models["digit"]["2"]
    gone = weakref.ref(taken)
    gc.disable()
    try:
        assert catalogue.load("digit") is None
        assert catalogue.models["digit"]["2"] is not taken
        assert gone() is taken
        del taken
        assert gone() is None
    finally:
        gc.enable()


def test_a_start_passes_over_a_broken_version_but_not_over_a_model_without_a_good_one(
    models: Path, tmp_path: Path
) -> None:
    lanes, board = Lanes(1), Board(tmp_path / "board")
    add_version(models, 2, damaged=True)
    found = Catalogue(Settings(models=models), board, lanes, LoopTurns())
    found.load_all()
    assert versions(found) == ["1"]
    add_version(models, 1, damaged=True)
    with pytest.raises(RepositoryError, match="sha256"):
        Catalogue(Settings(models=models), board, lanes, LoopTurns()).load_all()
    lanes.close()
    board.close()


def test_commands_reach_every_worker_and_those_who_come_later(tmp_path: Path) -> None:
    one = Commands(tmp_path)
    place = one.give(Command("unload", "digit"))
    assert not one.are_done(place)
    assert one.read() == [Command("unload", "digit")]
    one.done()
    assert one.are_done(place)
    assert one.read() == []
    one.give(Command("load", "digit"))
    assert Commands(tmp_path).unloaded() == set()
    one.give(Command("unload", "digit"))
    assert Commands(tmp_path).unloaded() == {"digit"}


# ---- through the doors, in every worker ----

ADMIN = {"Authorization": "Bearer open sesame"}


@pytest.fixture
def server(start_quintet: StartQuintet, models: Path) -> Iterator[QuintetServer]:
    settings = {"models": models, "admin_key": "open sesame", "watch_seconds": 0.3, "drain_seconds": 0}
    with start_quintet(**settings) as quintet:
        yield quintet


def served_versions(server: QuintetServer) -> set[str]:
    """What a caller gets who names no version, over several connections so that all workers are asked."""
    found = set()
    for _ in range(12):
        with http_client(server) as client:
            response = client.post("/digit", content=DIGIT.example["image"])
            found.add(response.json().get("version", str(response.status_code)))
    return found


def test_the_administrator_loads_and_unloads_in_all_workers(server: QuintetServer, models: Path) -> None:
    with tritonclient.http.InferenceServerClient(server.http_address) as client:
        with pytest.raises(InferenceServerException, match="administrator's key"):
            client.unload_model("digit")
        with pytest.raises(InferenceServerException, match="administrator's key"):
            client.unload_model("digit", headers={"Authorization": "Bearer wrong"})
        client.unload_model("digit", headers=ADMIN)
        assert not client.is_model_ready("digit")
        assert served_versions(server) == {"503"}
        (entry,) = client.get_model_repository_index()
        assert (entry["name"], entry["state"]) == ("digit", UNAVAILABLE)
        client.load_model("digit", headers=ADMIN)
        assert served_versions(server) == {"2"}
        with pytest.raises(InferenceServerException, match="neither config nor files"):
            client.load_model("digit", headers=ADMIN, config="{}")
        with pytest.raises(InferenceServerException, match="no such model"):
            client.load_model("no_such_model", headers=ADMIN)
    with tritonclient.grpc.InferenceServerClient(server.grpc_address) as client:
        authorization = {"authorization": "Bearer open sesame"}
        with pytest.raises(InferenceServerException, match="administrator's key"):
            client.load_model("digit")
        client.unload_model("digit", headers=authorization)
        assert served_versions(server) == {"503"}
        client.load_model("digit", headers=authorization)
        assert served_versions(server) == {"2"}
        index = client.get_model_repository_index(as_json=True)["models"]
        assert [(one["version"], one["state"]) for one in index] == [("1", READY), ("2", READY)]


def test_a_corrupt_version_leaves_the_one_before_it_serving_and_says_so(
    server: QuintetServer, models: Path
) -> None:
    add_version(models, 3, damaged=True)
    with http_client(server) as client:
        refused = client.post("/v2/repository/models/digit/load", headers=ADMIN)
        assert refused.status_code == 400
        assert "Version 3 of the model digit was not loaded" in refused.json()["error"]
        assert str(models) not in refused.text
        index = client.post("/v2/repository/index").json()
        assert [(one["version"], one["state"]) for one in index] == [
            ("1", READY), ("2", READY), ("3", UNAVAILABLE),
        ]  # fmt: skip
        only_ready = client.post("/v2/repository/index", json={"ready": True}).json()
        assert [one["version"] for one in only_ready] == ["1", "2"]
    assert served_versions(server) == {"2"}
    assert '"level": "error"' in server.log_text()
    assert "the file was altered" in server.log_text()


def test_a_version_that_comes_later_is_counted_from_0(server: QuintetServer, models: Path) -> None:
    add_version(models, 3)
    with http_client(server) as client:
        assert client.post("/v2/repository/models/digit/load", headers=ADMIN).status_code == 200
        counts = {
            sample.labels["protocol"]: sample.value
            for family in text_string_to_metric_families(client.get("/metrics").text)
            for sample in family.samples
            if sample.name == "quintet_requests_total" and sample.labels["version"] == "3"
        }
    assert counts == dict.fromkeys(PROTOCOLS, 0), "an increase from nothing to 1 is none to Prometheus"


RELOADS = 20


async def test_no_request_fails_while_versions_are_loaded_anew_break_and_come(
    server: QuintetServer, models: Path
) -> None:
    """Callers of all kinds ask without a pause, each on a connection that a reload must not cost them."""
    answered: dict[str, Counter[str]] = {"people": Counter(), "http": Counter(), "grpc": Counter()}
    picture, is_over = DIGIT.example["image"], False

    def ask_as_people() -> None:
        with http_client(server) as client:
            while not is_over:
                response = client.post("/digit", content=picture)
                assert response.status_code == 200, response.text
                answered["people"][response.json()["version"]] += 1

    def ask_as_machine_over_http() -> None:
        sent = tritonclient.http.InferInput("image", [1], "BYTES")
        sent.set_data_from_numpy(np.array([picture], np.object_))
        with tritonclient.http.InferenceServerClient(server.http_address) as client:
            while not is_over:
                answer = client.infer("digit", [sent]).get_response()
                answered["http"][answer["model_version"]] += 1

    def ask_as_machine_over_grpc() -> None:
        with GrpcClient(server.grpc_address) as client:
            while not is_over:
                answered["grpc"][client.call("ModelInfer", picture_request(picture)).model_version] += 1

    def load_anew() -> httpx.Response:
        with http_client(server, headers=ADMIN) as client:
            return client.post("/v2/repository/models/digit/load")

    callers = [ask_as_people, ask_as_machine_over_http, ask_as_machine_over_grpc]
    asking = [asyncio.create_task(asyncio.to_thread(caller)) for caller in callers]
    try:
        for _ in range(RELOADS):
            response = await asyncio.to_thread(load_anew)
            assert response.status_code == 200, response.text
        await asyncio.to_thread(add_version, models, 3, damaged=True)
        refused = await asyncio.to_thread(load_anew)
        assert "Version 3 of the model digit was not loaded" in refused.json()["error"]
        assert all(set(versions) == {"2"} for versions in answered.values())
        await asyncio.to_thread(add_version, models, 3)
        # Each worker looks for itself, so for a moment callers may meet both.
        for _ in range(300):
            if await asyncio.to_thread(served_versions, server) == {"3"}:
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError("not every worker serves version 3")
    finally:
        is_over = True
        await asyncio.gather(*asking)
    # Whoever was refused or cut off, once, has ended their thread with it.
    for versions in answered.values():
        assert set(versions) == {"2", "3"}
        assert versions["2"] > RELOADS
