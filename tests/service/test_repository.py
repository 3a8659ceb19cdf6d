"""What is in the repository is found, verified and read once; what is not right is refused and named."""

import json
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from service.errors import NotFound
from service.models.digit import DIGIT
from service.models.sentiment import SENTIMENT
from service.repository import MAX_CARD_BYTES, Repository, RepositoryError

from ..texts import tokenizer_file

NETWORK = b"the bytes of a network"
NO_CHANGES: Mapping[str, object] = {}


def right_card(version: str = "1", network: bytes = NETWORK) -> dict[str, Any]:
    entry = {"path": "model.onnx", "bytes": len(network), "sha256": sha256(network).hexdigest()}
    return {
        "model": "digit",
        "version": version,
        "labels": ["0", "1"],
        "files": {"fp32": entry},
        "arch": "cnn",
    }


def add_version(
    folder: Path, version: str = "1", network: bytes = NETWORK, changes: Mapping[str, object] = NO_CHANGES
) -> Path:
    """Write a version of the digit model whose card is right but for `changes`."""
    version_folder = folder / "digit" / version
    version_folder.mkdir(parents=True)
    (version_folder / "model.onnx").write_bytes(network)
    card = right_card(version, network) | dict(changes)
    (version_folder / "card.json").write_text(json.dumps(card))
    return version_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    add_version(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- finding


def test_versions_are_whole_numbers_in_order_and_the_highest_is_the_latest(folder: Path) -> None:
    for version in ("10", "9", "2"):
        add_version(folder, version)
    repository = Repository(folder)
    assert repository.versions("digit") == [1, 2, 9, 10]
    assert repository.latest("digit") == 10
    assert repository.open("digit").version == 10


def test_what_is_no_version_is_passed_over(folder: Path) -> None:
    for name in (
        "01",
        "0",
        "-1",
        "+2",
        "latest",
        "1.0",
        " 3",
        "2 ",
        "1e3",
        ".staging-4",
        "1234567890",
        "\u0663",
    ):
        (folder / "digit" / name).mkdir()
    (folder / "digit" / "7").write_text("a file, not a folder")
    assert Repository(folder).versions("digit") == [1]


def test_models_are_the_folders_with_plain_names(folder: Path) -> None:
    for name in ("sentiment", ".hidden", "Upper"):
        (folder / name).mkdir()
    (folder / "README").write_text("a file")
    assert Repository(folder).models() == ["digit", "sentiment"]


def test_a_version_exported_meanwhile_is_seen(folder: Path) -> None:
    repository = Repository(folder)
    assert repository.latest("digit") == 1
    add_version(folder, "2")
    assert repository.latest("digit") == 2


def test_a_repository_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="no model repository at"):
        Repository(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "model", ["image", "", ".", "..", "../digit", "/etc", "digit/1", "digit\0", "DIGIT", "é"]
)
def test_an_unknown_model_is_not_found_and_its_name_is_no_way_out(folder: Path, model: str) -> None:
    (folder / "models").mkdir()
    repository = Repository(folder / "models")
    (folder / "models" / "digit").mkdir()
    with pytest.raises(NotFound, match="there are: digit") as caught:
        repository.open(model)
    assert str(folder) not in caught.value.detail
    assert model == "image" or not model or f"model {model}" not in caught.value.detail


def test_an_unknown_version_is_not_found_and_the_known_ones_are_named(folder: Path) -> None:
    add_version(folder, "2")
    with pytest.raises(NotFound, match=r"^Model digit has no version 9; it has 1, 2\.$"):
        Repository(folder).open("digit", "9")


@pytest.mark.parametrize(
    "version",
    [
        "",
        "0",
        "01",
        "-1",
        "+1",
        "1 ",
        "1\n",
        "1.0",
        "latest",
        "../1",
        "1/../1",
        "\u0661",
        "9" * 400,
        0,
        -1,
        True,
    ],
)
def test_what_is_no_version_number_is_not_found(folder: Path, version: str | int) -> None:
    with pytest.raises(NotFound, match=r"^A version is a whole number from 1 up; model digit has 1\.$"):
        Repository(folder).open("digit", version)


def test_a_model_without_versions_is_not_found(folder: Path) -> None:
    (folder / "image").mkdir()
    repository = Repository(folder)
    assert repository.versions("image") == []
    for ask in (repository.latest, repository.open):
        with pytest.raises(NotFound, match="Model image has no versions"):
            ask("image")


# ---------------------------------------------------------------- reading


def test_a_right_version_is_read_whole(folder: Path) -> None:
    files = Repository(folder).open("digit", "1")
    assert (files.model, files.version, files.variant, files.labels) == ("digit", 1, "fp32", ("0", "1"))
    assert files.network == NETWORK
    assert files.path == folder / "digit" / "1" / "model.onnx"
    assert files.card == right_card()
    assert Repository(folder).open("digit", 1) == files


def test_the_bytes_stay_the_verified_ones_whatever_happens_to_the_file(folder: Path) -> None:
    files = Repository(folder).open("digit")
    files.path.write_bytes(b"swapped")
    assert files.network == NETWORK


def test_the_first_variant_that_the_card_has_is_read(folder: Path) -> None:
    small = b"fewer bits"
    both = right_card()["files"] | {
        "int8": {"path": "model.int8.onnx", "bytes": len(small), "sha256": sha256(small).hexdigest()}
    }
    version = add_version(folder, "2", changes={"files": both})
    (version / "model.int8.onnx").write_bytes(small)
    repository = Repository(folder)
    assert repository.open("digit", "2", ("int8", "fp32")).network == small
    assert repository.open("digit", "1", ("int8", "fp32")).variant == "fp32"
    with pytest.raises(RepositoryError, match="holds fp32, and none of fp16; export one of them"):
        repository.open("digit", "1", ("fp16",))


# ---------------------------------------------------------------- the file


def flip_a_bit(version: Path) -> None:
    (version / "model.onnx").write_bytes(NETWORK[:5] + bytes([NETWORK[5] ^ 1]) + NETWORK[6:])


def cut_short(version: Path) -> None:
    (version / "model.onnx").write_bytes(NETWORK[:-1])


def make_longer(version: Path) -> None:
    (version / "model.onnx").write_bytes(NETWORK + b"\0")


def remove(version: Path) -> None:
    (version / "model.onnx").unlink()


def link_outside(version: Path) -> None:
    """A link to a file with the very bytes that the card asks for."""
    outside = version.parent.parent / "outside.onnx"
    (version / "model.onnx").rename(outside)
    (version / "model.onnx").symlink_to(outside)


def link_nowhere(version: Path) -> None:
    remove(version)
    (version / "model.onnx").symlink_to("nowhere")


def make_folder(version: Path) -> None:
    remove(version)
    (version / "model.onnx").mkdir()


def make_pipe(version: Path) -> None:
    remove(version)
    os.mkfifo(version / "model.onnx")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        pytest.param(
            flip_a_bit, "has the sha256 .*, its card says .*: the file was altered", id="flipped-bit"
        ),
        pytest.param(cut_short, "has 21 bytes, its card says 22", id="cut-short"),
        pytest.param(make_longer, "has 23 bytes, its card says 22", id="one-byte-more"),
        pytest.param(remove, "is missing; restore it", id="missing"),
        pytest.param(link_outside, "is a link; put the file itself there", id="link-out-of-the-folder"),
        pytest.param(link_nowhere, "is a link; put the file itself there", id="link-to-nowhere"),
        pytest.param(make_folder, "cannot be read|is not a plain file", id="folder"),
        pytest.param(make_pipe, "is not a plain file", id="pipe-that-would-wait"),
    ],
)
def test_a_file_that_is_not_its_cards_is_not_loaded(
    folder: Path, harm: Callable[[Path], None], says: str
) -> None:
    harm(folder / "digit" / "1")
    with pytest.raises(RepositoryError, match=rf"model\.onnx {says}"):
        Repository(folder).open("digit")


def test_a_broken_version_does_not_hide_the_others(folder: Path) -> None:
    remove(add_version(folder, "2"))
    repository = Repository(folder)
    assert repository.versions("digit") == [1, 2]
    with pytest.raises(RepositoryError):
        repository.open("digit")
    assert repository.open("digit", "1").network == NETWORK


# ---------------------------------------------------------------- the card


@pytest.mark.parametrize(
    "path",
    [
        "../1/model.onnx",
        "..",
        ".",
        "/etc/passwd",
        "sub/model.onnx",
        "",
        ".model.onnx",
        "a\\b",
        "a\0b",
        "a\n",
        3,
        None,
    ],
)
def test_a_path_on_the_card_that_is_no_plain_file_name_is_refused(tmp_path: Path, path: object) -> None:
    files = right_card()["files"]
    files["fp32"]["path"] = path
    add_version(tmp_path, changes={"files": files})
    with pytest.raises(RepositoryError, match="where a plain file name is wanted"):
        Repository(tmp_path).open("digit")


def entry(**changes: object) -> dict[str, object]:
    return {"files": {"fp32": right_card()["files"]["fp32"] | changes}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"model": "image"}, "\"model\" is 'image', and the folder is 'digit'", id="other-model"),
        pytest.param({"version": "2"}, "\"version\" is '2', and the folder is '1'", id="other-version"),
        pytest.param({"version": 1}, '"version" is 1, and', id="version-as-a-number"),
        pytest.param({"labels": "01"}, '"labels" is not a list of texts', id="labels-as-text"),
        pytest.param({"labels": [0, 1]}, '"labels" is not a list of texts', id="labels-as-numbers"),
        pytest.param({"labels": None}, '"labels" is not a list of texts', id="no-labels"),
        pytest.param({"files": {}}, "does not name a single file", id="no-files"),
        pytest.param({"files": ["model.onnx"]}, "does not name a single file", id="files-as-a-list"),
        pytest.param({"files": {"fp32": "model.onnx"}}, "is not an object with path", id="file-as-text"),
        pytest.param(entry(bytes="22"), "has '22' bytes; that is no size", id="size-as-text"),
        pytest.param(entry(bytes=-1), "has -1 bytes; that is no size", id="negative-size"),
        pytest.param(entry(bytes=True), "has True bytes; that is no size", id="size-true"),
        pytest.param(entry(bytes=1 << 40), "bytes; that is no size", id="size-of-a-terabyte"),
        pytest.param(entry(sha256="abc"), "64 lower-case hexadecimal digits are wanted", id="short-sha256"),
        pytest.param(entry(sha256=None), "64 lower-case hexadecimal digits are wanted", id="no-sha256"),
    ],
)
def test_a_card_of_the_wrong_shape_is_refused_and_the_field_named(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    add_version(tmp_path, changes=changes)
    with pytest.raises(RepositoryError) as caught:
        Repository(tmp_path).open("digit")
    assert says in str(caught.value)
    assert "card.json" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut-short"),
        pytest.param(b"\xff\xfe\x00", id="not-text"),
        pytest.param(b"[" * 200_000, id="very-deep"),
    ],
)
def test_a_card_that_is_not_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / "digit" / "1" / "card.json").write_bytes(content)
    with pytest.raises(RepositoryError, match=r"card\.json is not JSON"):
        Repository(folder).open("digit")


@pytest.mark.parametrize("content", [b"[]", b"null", b'"card"', b"1"])
def test_a_card_that_is_no_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "digit" / "1" / "card.json").write_bytes(content)
    with pytest.raises(RepositoryError, match="the card is not a JSON object"):
        Repository(folder).open("digit")


def test_a_missing_linked_or_enormous_card_is_refused(folder: Path) -> None:
    card = folder / "digit" / "1" / "card.json"
    card.rename(folder / "elsewhere.json")
    with pytest.raises(RepositoryError, match=r"card\.json is missing"):
        Repository(folder).open("digit")
    card.symlink_to(folder / "elsewhere.json")
    with pytest.raises(RepositoryError, match=r"card\.json is a link"):
        Repository(folder).open("digit")
    card.unlink()
    card.write_bytes(b" " * (MAX_CARD_BYTES + 1))
    with pytest.raises(RepositoryError, match=r"card\.json has \d+ bytes; at most"):
        Repository(folder).open("digit")


def test_a_network_whose_weights_lie_in_another_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given bytes, ONNX Runtime would take them from the working directory, where nobody hashed them."""
    network, weights = network_with_external_weights()
    monkeypatch.chdir(tmp_path)
    Path("weights.bin").write_bytes(weights)
    add_version(tmp_path, network=network)
    with pytest.raises(RepositoryError, match=r"model\.onnx keeps tensors in other files"):
        Repository(tmp_path).open("digit")


def network_with_external_weights() -> tuple[bytes, bytes]:
    """A valid ONNX file and the bytes of the one tensor that it leaves outside."""
    import numpy as np
    import onnx
    from onnx.external_data_helper import set_external_data

    values = np.ones((4, 4), np.float32)
    weights = onnx.numpy_helper.from_array(values, "weights")
    set_external_data(weights, location="weights.bin")
    weights.ClearField("raw_data")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "weights"], ["y"])], "g", [x], [y], [weights]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString(), values.tobytes()


# ---------------------------------------------------------------- assets

TOKENIZER_FILE = tokenizer_file()
LISTED = {"tokenizer.json": {"bytes": len(TOKENIZER_FILE), "sha256": sha256(TOKENIZER_FILE).hexdigest()}}


def test_what_a_room_needs_beside_its_network_comes_verified_with_it(folder: Path) -> None:
    version = add_version(folder, "2", changes={"assets": LISTED})
    (version / "tokenizer.json").write_bytes(TOKENIZER_FILE)
    files = Repository(folder).open("digit")
    assert files.assets == {"tokenizer.json": TOKENIZER_FILE}
    room = files.furnish(SENTIMENT)
    assert len(room.to_tensor({"text": b"a good film"}).tensors[0]) == 5
    assert files.furnish(DIGIT) is DIGIT, "a room that needs nothing stays as it is"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(TOKENIZER_FILE[:-1], "bytes, its card says", id="cut-short"),
        pytest.param(TOKENIZER_FILE[:-1] + b" ", "the file was altered", id="altered"),
        pytest.param(None, "is missing; restore it", id="missing"),
    ],
)
def test_an_asset_that_is_not_its_cards_is_not_loaded(
    folder: Path, content: bytes | None, message: str
) -> None:
    version = add_version(folder, "2", changes={"assets": LISTED})
    if content is not None:
        (version / "tokenizer.json").write_bytes(content)
    with pytest.raises(RepositoryError, match=message):
        Repository(folder).open("digit")


@pytest.mark.parametrize(
    ("assets", "message"),
    [
        pytest.param(["tokenizer.json"], '"assets" is not an object', id="a-list"),
        pytest.param(
            {"../tokenizer.json": LISTED["tokenizer.json"]}, "a plain file name is wanted", id="a-path"
        ),
        pytest.param({"tokenizer.json": {}}, "that is no size", id="nothing-known-of-it"),
        pytest.param({"tokenizer.json": "sha256"}, "is not an object with bytes and sha256", id="text"),
    ],
)
def test_a_card_with_assets_in_disorder_is_refused(tmp_path: Path, assets: object, message: str) -> None:
    add_version(tmp_path, changes={"assets": assets})
    with pytest.raises(RepositoryError, match=message):
        Repository(tmp_path).open("digit")


def test_a_room_is_not_opened_without_what_it_needs(folder: Path) -> None:
    with pytest.raises(RepositoryError, match=r'names no tokenizer\.json under "assets"'):
        Repository(folder).open("digit").furnish(SENTIMENT)
    other = b"{}"
    listed = {"tokenizer.json": {"bytes": len(other), "sha256": sha256(other).hexdigest()}}
    (add_version(folder, "2", changes={"assets": listed}) / "tokenizer.json").write_bytes(other)
    with pytest.raises(RepositoryError, match="is not a tokenizer"):
        Repository(folder).open("digit").furnish(SENTIMENT)
