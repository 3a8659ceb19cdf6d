"""Every model keeps the promises that all make: a sixth one is tested on arrival."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.models.spec import Room, Tensor
from service.repository import Repository
from service.runtime import Network
from tests.conftest import SHIPPED

from .conftest import MODELS_FOLDER, QuintetServer

MEBIBYTE = 1024 * 1024
TOLERANCE = 1e-3
ROUNDED_TOLERANCE = 5e-3

every_model = pytest.mark.parametrize("room", SHIPPED.values(), ids=str)


def versions_of(room: Room) -> list[Path]:
    """The folders of all versions that ship, lowest first."""
    folder = MODELS_FOLDER / room.name
    versions = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(versions, key=lambda path: int(path.name))


def cards_of(room: Room) -> list[tuple[Path, dict[str, Any]]]:
    folders = versions_of(room)
    assert folders, f"{room} ships no version"
    return [(folder, json.loads((folder / "card.json").read_text(encoding="utf-8"))) for folder in folders]


def network_of(room: Room) -> Network:
    return Network(room, Repository(MODELS_FOLDER).open(room.name).network)


def furnished(room: Room) -> Room:
    """The room as it serves: with the files that it needs beside its network, if any."""
    return Repository(MODELS_FOLDER).open(room.name).furnish(room) if room.assets else room


def examples(tensor: Tensor, count: int) -> np.ndarray[Any, Any]:
    """Made-up values of a tensor's type, with lengths of five where any will do."""
    shape = [count, *(5 if axis < 0 else axis for axis in tensor.shape)]
    chance = np.random.default_rng(0)
    if tensor.dtype.kind == "f":
        return chance.normal(size=shape).astype(tensor.dtype)
    return chance.integers(0, 2 if tensor.datatype == "BOOL" else 10, shape).astype(tensor.dtype)


# ---- the room ----


@every_model
def test_the_room_is_known_by_its_name(room: Room) -> None:
    assert SHIPPED[room.name] is room
    assert room.name.isidentifier()
    assert room.name == room.name.lower()
    assert room.task.endswith(".")
    assert len(set(room.labels)) == len(room.labels)


@every_model
def test_the_room_prepares_its_example_for_its_network(room: Room) -> None:
    sample = furnished(room).to_tensor(room.example)
    assert len(sample.tensors) == len(room.network_inputs)
    for array, tensor in zip(sample.tensors, room.network_inputs, strict=True):
        assert array.dtype == tensor.dtype
        assert len(array.shape) == len(tensor.shape)
        assert all(want in (-1, have) for have, want in zip(array.shape, tensor.shape, strict=True))


@every_model
def test_the_answer_has_the_promised_outputs(room: Room) -> None:
    sample = furnished(room).to_tensor(room.example)
    answer = room.to_answer(network_of(room).run([sample])[0], sample)
    for tensor in room.outputs:
        value = answer.as_tensor(tensor.name)
        if tensor.datatype == "BYTES":
            assert isinstance(value, bytes)
            continue
        shape = np.asarray(value, tensor.dtype).shape
        assert len(shape) == len(tensor.shape)
        assert all(want in (-1, have) for have, want in zip(shape, tensor.shape, strict=True))
    assert json.loads(json.dumps(answer.as_json())) == answer.as_json()


# ---- what ships ----


@every_model
def test_every_version_has_a_card_with_all_fields(room: Room) -> None:
    for folder, card in cards_of(room):
        assert (card["model"], card["version"]) == (room.name, folder.name)
        assert card["labels"] == list(room.labels)
        for words in ("task", "licence", "intended_use", "limits"):
            assert len(card[words]) > 3, words
        assert set(card["data"]) >= {"name", "sha256", "split"}
        assert set(card["training"]) >= {
            "command", "seed", "minutes", "device", "parameters", "commit", "torch",
        }  # fmt: skip
        assert f"python -m training {room.name}" in card["training"]["command"]
        assert set(card["export"]) >= {"opset", "onnx", "onnxruntime", "largest_difference"}
        # Bytes are rounded: a last bit may turn one of them by a whole level.
        in_bytes = all(tensor.dtype.kind in "iu" for tensor in room.network_outputs)
        # Where no fp32 file ships, for it would be too large for git, the fp16 file is what was compared.
        tolerance = TOLERANCE if "fp32" in card["files"] else ROUNDED_TOLERANCE
        assert card["export"]["largest_difference"] <= (1 if in_bytes else tolerance)
        # A score for each file, and only for those.
        assert set(card["scores"]) == set(card["files"])
        for scores in card["scores"].values():
            assert scores
            assert all(isinstance(score, int | float) for score in scores.values())


@every_model
def test_every_file_is_the_one_that_its_card_names(room: Room) -> None:
    for folder, card in cards_of(room):
        assert set(card["files"]) >= {"fp32"} or set(card["files"]) >= {"fp16", "int8"}
        for entry in card["files"].values():
            content = (folder / entry["path"]).read_bytes()
            assert len(content) == entry["bytes"] < 48 * MEBIBYTE
            assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert set(card.get("assets", ())) == set(room.assets)
        # Opening verifies the assets.
        Repository(MODELS_FOLDER).open(room.name, folder.name)


@every_model
def test_no_file_ships_that_no_card_names(room: Room) -> None:
    for folder, card in cards_of(room):
        named = {entry["path"] for entry in card["files"].values()} | set(card.get("assets", ()))
        assert {path.name for path in folder.iterdir()} <= named | {"card.json"}


def test_all_that_ships_fits_into_git() -> None:
    sizes = [path.stat().st_size for path in MODELS_FOLDER.rglob("*") if path.is_file()]
    assert 0 < sum(sizes) < 120 * MEBIBYTE


def test_nothing_ships_that_has_no_room() -> None:
    assert {path.name for path in MODELS_FOLDER.iterdir() if path.is_dir()} <= set(SHIPPED)


# ---- the network ----


@every_model
def test_the_network_answers_one_and_many_alike(room: Room) -> None:
    """The session opens at all only if its tensors are the room's."""
    network = network_of(room)
    sample = furnished(room).to_tensor(room.example)
    (alone,) = network.run([sample])
    for size in (2, 7, 64):
        rows = network.run([sample] * size)
        assert len(rows) == size
        for row in rows:
            for output, expected, tensor in zip(row, alone, room.network_outputs, strict=True):
                assert output.dtype == tensor.dtype
                np.testing.assert_allclose(output, expected, atol=TOLERANCE)


@every_model
def test_an_answer_does_not_depend_on_its_neighbours(room: Room) -> None:
    network = network_of(room)
    sample = furnished(room).to_tensor(room.example)
    columns = [examples(tensor, 8) for tensor in room.network_inputs]
    strangers = [type(sample)(tuple(column[row] for column in columns)) for row in range(8)]
    (alone,) = network.run([sample])
    among_strangers = network.run([*strangers[:4], sample, *strangers[4:]])[4]
    for output, expected in zip(among_strangers, alone, strict=True):
        # Where lengths differ, a row among longer ones is padded.
        same_part = output[tuple(slice(length) for length in expected.shape)]
        np.testing.assert_allclose(same_part, expected, atol=TOLERANCE)


# ---- the doors ----


def as_v2_inputs(room: Room) -> list[dict[str, Any]]:
    """The room's example as JSON tensors; a picture's bytes travel as base64."""
    chosen = next(tensors for tensors in room.inputs if {one.name for one in tensors} == set(room.example))
    described = []
    for tensor in chosen:
        value = room.example[tensor.name]
        if isinstance(value, bytes):
            value = base64.b64encode(value).decode() if room.takes == "pictures" else value.decode()
        data = np.asarray(value).ravel().tolist()
        described.append(
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": [1, *np.shape(value)],
                "data": data,
            }
        )
    return described


def as_people_ask(room: Room) -> dict[str, Any]:
    """The room's example as a body for `POST /<model>`."""
    if room.takes == "pictures":
        return {"content": room.example["image"]}
    if room.takes == "texts":
        text = room.example["text"]
        return {"json": {"texts": [text.decode() if isinstance(text, bytes) else text]}}
    return {"json": {"digits": [int(room.example["digit"])], "seed": int(room.example["seed"])}}


@every_model
def test_people_can_ask_it(quintet_server: QuintetServer, room: Room) -> None:
    response = httpx.post(f"{quintet_server.http_url}/{room.name}", trust_env=False, **as_people_ask(room))
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["model"] == room.name
    assert answer["version"] == versions_of(room)[-1].name
    sample = furnished(room).to_tensor(room.example)
    expected = room.to_answer(network_of(room).run([sample])[0], sample).as_json()
    (prediction,) = answer["predictions"]
    assert set(prediction) == set(expected)
    if "probabilities" in expected:
        assert prediction["probabilities"] == pytest.approx(expected["probabilities"], abs=TOLERANCE)
        assert prediction["label"] == expected["label"]


@every_model
def test_machines_can_ask_it_and_are_told_what_the_room_says(
    quintet_server: QuintetServer, room: Room
) -> None:
    with httpx.Client(base_url=f"{quintet_server.http_url}/v2/models", trust_env=False) as client:
        metadata = client.get(f"/{room.name}").json()
        response = client.post(f"/{room.name}/infer", json={"inputs": as_v2_inputs(room)})
    assert metadata["name"] == room.name
    assert metadata["versions"] == [folder.name for folder in versions_of(room)]
    described = {
        "inputs": [tensor for tensors in room.inputs for tensor in tensors],
        "outputs": room.outputs,
    }
    for side, tensors in described.items():
        assert metadata[side] == [
            {"name": one.name, "datatype": one.datatype, "shape": [-1, *one.shape]} for one in tensors
        ]
    assert response.status_code == 200, response.text
    outputs = response.json()["outputs"]
    assert [(output["name"], output["datatype"]) for output in outputs] == [
        (tensor.name, tensor.datatype) for tensor in room.outputs
    ]
    for output, tensor in zip(outputs, room.outputs, strict=True):
        assert output["shape"][0] == 1
        assert len(output["shape"]) == 1 + len(tensor.shape)


@every_model
def test_it_is_in_the_list_that_people_see(quintet_server: QuintetServer, room: Room) -> None:
    wrong = httpx.post(f"{quintet_server.http_url}/no_such_model", trust_env=False)
    assert wrong.status_code == 404
    assert f"/{room.name}" in wrong.json()["detail"]
