"""Every row of the contract's table of errors, at every door, for every model; read the ids.

The many forms that one kind of mistake can take are in `test_bad_input.py`, a fault of ours in
`test_overload.py`, the ends of starting and draining in `test_shutdown.py`.
"""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Self

import grpc
import pytest

from load_tests.doors import body_of
from service.models import MODELS
from service.models.spec import Inputs, Room
from service.proto import grpc_service_pb2 as pb
from tests.conftest import SHIPPED, QuintetServer, StartQuintet

from .knocking import GrpcClient, binary, http_client, png_claiming, tensor, with_binary
from .refusals import GRPC_STATUS, check_grpc_error, check_problem, check_v2_error

MEBIBYTE = 1024 * 1024


@dataclass(frozen=True)
class Column:
    """One tensor of a request for machines, with its bytes."""

    name: str
    datatype: str
    shape: Sequence[int]
    raw: bytes


def columns_of(inputs: Sequence[Inputs]) -> list[Column]:
    """Inputs as machines send them."""
    columns = []
    for name in inputs[0]:
        values = [one[name] for one in inputs]
        if isinstance(values[0], bytes):
            columns.append(Column(name, "BYTES", [len(values)], binary(*values)))
        else:
            columns.append(Column(name, "INT64", [len(values)], struct.pack(f"<{len(values)}q", *values)))
    return columns


# ---- the three ways to knock ----

PEOPLE, OVER_HTTP, OVER_GRPC = "for people", "for machines over HTTP", "for machines over gRPC"
ALL, MACHINES, HTTP = (PEOPLE, OVER_HTTP, OVER_GRPC), (OVER_HTTP, OVER_GRPC), (PEOPLE, OVER_HTTP)


@dataclass(frozen=True)
class Refusal:
    """What a caller is told, at whatever door; over gRPC `headers` are the metadata at the end."""

    sentence: str
    headers: dict[str, str]


def authorization(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


class Knocker:
    """A caller at one of the doors, who expects to be refused with a status of HTTP's."""

    def __init__(self, door: str, server: QuintetServer, key: str) -> None:
        self.door = door
        self._http = http_client(server, headers=authorization(key))
        self._grpc = GrpcClient(server.grpc_address)
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()

    def ask(
        self,
        room: Room,
        inputs: Sequence[Inputs],
        status: int,
        *,
        index: int | None = None,
        milliseconds: float | None = None,
    ) -> Refusal:
        """Ask a model about inputs; of several the one at `index` is at fault."""
        if self.door == PEOPLE:
            body = body_of(room, inputs)
            if milliseconds is not None:
                body["headers"] = body.get("headers", {}) | {"Quintet-Timeout-Ms": str(milliseconds)}
            return self.send("POST", f"/{room.name}", status, index=index, **body)
        parameters = {} if milliseconds is None else {"timeout": round(milliseconds * 1000)}
        return self.infer(room.name, columns_of(inputs), status, index=index, parameters=parameters)

    def send(self, method: str, path: str, status: int, *, index: int | None = None, **body: Any) -> Refusal:
        """Any request over HTTP; `body` is httpx's."""
        response = self._http.request(method, path, **body)
        if path.startswith("/v2"):
            return Refusal(check_v2_error(response, status), dict(response.headers))
        return Refusal(check_problem(response, status, index), dict(response.headers))

    def call(self, method: str, request: Any, status: int, *, index: int | None = None) -> Refusal:
        """Any call over gRPC."""
        error = self._grpc.refusal(method, request, metadata=self._metadata)
        return Refusal(check_grpc_error(error, status, index), dict(error.trailing_metadata()))

    def infer(
        self,
        model: str,
        columns: Sequence[Column],
        status: int,
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        parameters: Mapping[str, int] = MappingProxyType({}),
        index: int | None = None,
    ) -> Refusal:
        """An inference as machines ask for it."""
        if self.door == OVER_HTTP:
            head = {
                "inputs": [
                    tensor(one.name, one.datatype, one.shape, parameters={"binary_data_size": len(one.raw)})
                    for one in columns
                ],
                "outputs": [{"name": name} for name in outputs],
                "parameters": dict(parameters),
            }
            path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
            return self.send("POST", path, status, **with_binary(head, *(one.raw for one in columns)))
        request = pb.ModelInferRequest(model_name=model, model_version=version)
        for one in columns:
            request.inputs.add(name=one.name, datatype=one.datatype, shape=one.shape)
            request.raw_input_contents.append(one.raw)
        for name in outputs:
            request.outputs.add(name=name)
        for name, value in parameters.items():
            request.parameters[name].int64_param = value
        return self.call("ModelInfer", request, status, index=index)

    def code_of(self, request: Any) -> grpc.StatusCode:
        """Of a refusal that is grpc's own, in its own words."""
        return self._grpc.refusal("ModelInfer", request).code()

    def place_of(self, room: Room) -> str:
        """Where the model is asked over HTTP."""
        return f"/{room.name}" if self.door == PEOPLE else f"/v2/models/{room.name}/infer"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()
        self._grpc.__exit__()


UNREADABLE: dict[str, Inputs] = {
    "pictures": {"image": b"a seven, I promise"},
    "texts": {"text": b" \n"},
    "digits": {"digit": 10, "seed": 7},
}
"""By `Room.takes`: an input that nothing can be made of."""


# ---- the rows: how it is asked, and what must come of it ----


def an_unreadable_input(room: Room, door: Knocker) -> None:
    door.ask(room, [UNREADABLE[room.takes]], 400)


def one_unreadable_input_of_three(room: Room, door: Knocker) -> None:
    good = room.example
    door.ask(room, [good, {**good, **UNREADABLE[room.takes]}, good], 400, index=1)


def a_text_that_is_not_utf_8(room: Room, door: Knocker) -> None:
    assert "UTF-8" in door.ask(room, [{"text": b"caf\xe9"}], 400).sentence


def a_picture_of_too_many_pixels(room: Room, door: Knocker) -> None:
    assert "30000x30000" in door.ask(room, [{"image": png_claiming(30_000, 30_000)}], 400).sentence


def no_input_at_all(room: Room, door: Knocker) -> None:
    if door.door == PEOPLE:
        field = {"pictures": "images", "texts": "texts", "digits": "digits"}[room.takes]
        door.send("POST", f"/{room.name}", 400, json={field: []})
    else:
        empty = [replace(one, shape=[0], raw=b"") for one in columns_of([room.example])]
        assert "1 to 256" in door.infer(room.name, empty, 400).sentence


def too_many_inputs(room: Room, door: Knocker) -> None:
    assert "256" in door.ask(room, [UNREADABLE[room.takes]] * 257, 400).sentence


def a_tensor_of_another_shape(room: Room, door: Knocker) -> None:
    wide = [replace(one, shape=[1, 2]) for one in columns_of([room.example] * 2)]
    assert "must have the shape [n]" in door.infer(room.name, wide, 400).sentence


def a_tensor_of_another_datatype(room: Room, door: Knocker) -> None:
    floats = [replace(one, datatype="FP32", raw=bytes(4)) for one in columns_of([room.example])]
    assert "must be" in door.infer(room.name, floats, 400).sentence


def a_tensor_cut_short(room: Room, door: Knocker) -> None:
    door.infer(room.name, [replace(one, raw=one.raw[:-1]) for one in columns_of([room.example])], 400)


def a_tensor_of_another_name(room: Room, door: Knocker) -> None:
    strange = [replace(one, name="score") for one in columns_of([room.example])[:1]]
    assert f"The model {room} takes" in door.infer(room.name, strange, 400).sentence


def an_output_that_it_does_not_have(room: Room, door: Knocker) -> None:
    refused = door.infer(room.name, columns_of([room.example]), 400, outputs=["score"])
    assert room.outputs[0].name in refused.sentence


def a_field_that_it_does_not_have(room: Room, door: Knocker) -> None:
    door.send("POST", f"/{room.name}", 400, json={"scores": []})


def json_that_is_too_deep(room: Room, door: Knocker) -> None:
    headers = {"Content-Type": "application/json"}
    door.send("POST", door.place_of(room), 400, content=b"[" * 100_000, headers=headers)


def a_deadline_that_is_no_number(room: Room, door: Knocker) -> None:
    headers = {"Quintet-Timeout-Ms": "soon"}
    assert "milliseconds" in door.send("POST", door.place_of(room), 400, json={}, headers=headers).sentence


def a_key_that_is_not_ours(room: Room, door: Knocker) -> None:
    refused = door.ask(room, [room.example], 401)
    assert door.door == OVER_GRPC or refused.headers["www-authenticate"] == "Bearer"


def loading_by_anybody(room: Room, door: Knocker) -> None:
    assert all("switched off" in refused.sentence for refused in loading(room, door))


def loading_with_a_callers_key(room: Room, door: Knocker) -> None:
    assert all("administrator's key" in refused.sentence for refused in loading(room, door))


def loading(room: Room, door: Knocker) -> Iterator[Refusal]:
    for verb in ("load", "unload"):
        if door.door == OVER_HTTP:
            yield door.send("POST", f"/v2/repository/models/{room.name}/{verb}", 403)
        else:
            method = f"RepositoryModel{verb.capitalize()}"
            yield door.call(method, getattr(pb, f"{method}Request")(model_name=room.name), 403)


def a_model_of_another_name(room: Room, door: Knocker) -> None:
    if door.door == PEOPLE:
        door.send("POST", f"/{room.name}s", 404, json={})
    else:
        door.infer(f"{room.name}s", columns_of([room.example]), 404)


def a_version_that_there_is_not(room: Room, door: Knocker) -> None:
    assert "no such version" in door.infer(room.name, [], 404, version="999").sentence


def a_wrong_method(room: Room, door: Knocker) -> None:
    assert door.send("PUT", door.place_of(room), 405, content=b"{}").headers["allow"] == "POST"


def a_body_that_is_too_large(room: Room, door: Knocker) -> None:
    body = bytes(17 * MEBIBYTE)
    if door.door == OVER_GRPC:
        request = pb.ModelInferRequest(model_name=room.name, raw_input_contents=[body])
        assert door.code_of(request) is GRPC_STATUS[413]
    else:
        assert "16,777,216" in door.send("POST", door.place_of(room), 413, content=body).sentence


def a_media_type_that_is_not_served(room: Room, door: Knocker) -> None:
    headers = {"Content-Type": "text/html"}
    assert "; send " in door.send("POST", f"/{room.name}", 415, content=b"<p>", headers=headers).sentence


def more_than_the_queue_holds(room: Room, door: Knocker) -> None:
    refused = door.ask(room, [room.example] * 2, 429)
    assert "queue is full" in refused.sentence
    assert int(refused.headers["retry-after"]) >= 1


def a_model_that_is_not_loaded(room: Room, door: Knocker) -> None:
    refused = door.ask(room, [room.example], 503)
    assert f"The model {room} is not loaded" in refused.sentence
    assert refused.headers["retry-after"] == "1"


def a_deadline_that_has_passed(room: Room, door: Knocker) -> None:
    door.ask(room, [room.example], 504, milliseconds=0.001)


# ---- the table ----

Row = Callable[[Room, Knocker], None]
EVERY_KIND = ("pictures", "texts", "digits")


def table(
    *rows: tuple[Row, Sequence[str], Sequence[str]], rooms: Mapping[str, Room] = SHIPPED
) -> pytest.MarkDecorator:
    """Each row at each door that it has, for every model that takes such inputs; ids are sentences."""
    cases = [
        pytest.param(row, room, door, id=f"{room}: {row.__name__.replace('_', ' ')}, {door}")
        for row, doors, kinds in rows
        for room in rooms.values()
        for door in doors
        if room.takes in kinds
    ]
    return pytest.mark.parametrize(("row", "room", "door"), cases)


def check(server: QuintetServer, row: Row, room: Room, door: str, key: str = "", good_key: str = "") -> None:
    """See one row through, and that whoever comes next is answered."""
    with Knocker(door, server, key) as knocker:
        row(room, knocker)
    with http_client(server, headers=authorization(good_key)) as client:
        response = client.post(f"/{room.name}", **body_of(room, [room.example]))
    assert response.status_code == 200, response.text


@table(
    (an_unreadable_input, ALL, EVERY_KIND),
    (one_unreadable_input_of_three, ALL, EVERY_KIND),
    (a_text_that_is_not_utf_8, ALL, ["texts"]),
    (a_picture_of_too_many_pixels, ALL, ["pictures"]),
    (no_input_at_all, ALL, EVERY_KIND),
    (too_many_inputs, ALL, EVERY_KIND),
    (a_tensor_of_another_shape, MACHINES, EVERY_KIND),
    (a_tensor_of_another_datatype, MACHINES, EVERY_KIND),
    (a_tensor_cut_short, MACHINES, EVERY_KIND),
    (a_tensor_of_another_name, MACHINES, EVERY_KIND),
    (an_output_that_it_does_not_have, MACHINES, EVERY_KIND),
    (a_field_that_it_does_not_have, [PEOPLE], EVERY_KIND),
    (json_that_is_too_deep, HTTP, EVERY_KIND),
    (a_deadline_that_is_no_number, HTTP, EVERY_KIND),
    (loading_by_anybody, MACHINES, EVERY_KIND),
    (a_model_of_another_name, ALL, EVERY_KIND),
    (a_version_that_there_is_not, MACHINES, EVERY_KIND),
    (a_wrong_method, HTTP, EVERY_KIND),
    (a_body_that_is_too_large, ALL, EVERY_KIND),
    (a_media_type_that_is_not_served, [PEOPLE], EVERY_KIND),
    (a_deadline_that_has_passed, ALL, EVERY_KIND),
)
def test_it_is_refused(quintet_server: QuintetServer, row: Row, room: Room, door: str) -> None:
    check(quintet_server, row, room, door)


@pytest.fixture(scope="module")
def locked(start_quintet: StartQuintet) -> Iterator[QuintetServer]:
    """A service with keys, in which one input may wait."""
    keys = {"api_keys": ["first key"], "admin_key": "open sesame"}
    with start_quintet(**keys, queue_size=1, workers=1, drain_seconds=0) as server:
        yield server


@table((a_key_that_is_not_ours, ALL, EVERY_KIND))
@pytest.mark.parametrize("key", ["", "first ke", "open"], ids=["none", "cut short", "another"])
def test_without_the_right_key_nobody_gets_in(
    locked: QuintetServer, row: Row, room: Room, door: str, key: str
) -> None:
    check(locked, row, room, door, key, good_key="first key")


@table(
    (loading_with_a_callers_key, MACHINES, EVERY_KIND),
    (more_than_the_queue_holds, ALL, EVERY_KIND),
)
def test_with_a_callers_key_it_is_refused(locked: QuintetServer, row: Row, room: Room, door: str) -> None:
    check(locked, row, room, door, "first key", good_key="first key")


@pytest.fixture(scope="module")
def empty(start_quintet: StartQuintet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[QuintetServer]:
    """A service whose repository has no model."""
    folder = tmp_path_factory.mktemp("models")
    with start_quintet(models=folder, workers=1, drain_seconds=0) as server:
        yield server


@table((a_model_that_is_not_loaded, ALL, EVERY_KIND), rooms=MODELS)
def test_without_its_files_a_model_is_unavailable(
    empty: QuintetServer, row: Row, room: Room, door: str
) -> None:
    with Knocker(door, empty, "") as knocker:
        row(room, knocker)
