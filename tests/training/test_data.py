"""Finding, downloading and verifying a data set; the mirrors are real HTTP servers."""

import functools
import gzip
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import data
from training.data import Published, data_folder, find, sha256_of
from training.digit import PUBLISHED, load_mnist
from training.errors import TrainingError

from .conftest import idx

CONTENT = bytes(range(256)) * 40
FILE = Published("numbers.gz", len(CONTENT), sha256_of(CONTENT))


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: the suite's output is for failures."""


@pytest.fixture
def mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A server with three mirrors on it: one lacks the file, one has another, one is good."""
    monkeypatch.setattr(data, "WAIT_SECONDS", 0.01)
    root = tmp_path / "server"
    for name in ("empty", "other", "good"):
        (root / name).mkdir(parents=True)
    (root / "other" / FILE.name).write_bytes(gzip.compress(CONTENT[::-1]))
    (root / "good" / FILE.name).write_bytes(gzip.compress(CONTENT, 3))
    handler = functools.partial(QuietHandler, directory=str(root))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        yield {name: f"{address}{name}/" for name in ("empty", "other", "good")}
        server.shutdown()


def test_a_missing_file_comes_from_the_first_mirror_that_has_the_published_one(
    mirrors: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "data" / "numbers"
    assert find(FILE, home, list(mirrors.values())) == CONTENT
    assert [path.name for path in home.iterdir()] == [FILE.name], "no scraps are left"
    printed = capsys.readouterr().out.replace("\n", "")
    assert f"from {mirrors['empty']}" in printed
    assert f"from {mirrors['other']}" in printed
    assert find(FILE, home, ["http://127.0.0.1:9/"]) == CONTENT, "found, so not downloaded again"


def test_where_no_mirror_helps_the_message_says_which_file_goes_where(
    mirrors: dict[str, str], tmp_path: Path
) -> None:
    home = tmp_path / "numbers"
    with pytest.raises(TrainingError, match=r"fetch it from .*numbers\.gz elsewhere, put it there"):
        find(FILE, home, [mirrors["other"], mirrors["empty"], "http://127.0.0.1:9/"])
    assert list(home.iterdir()) == []


WHOLE = gzip.compress(CONTENT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(WHOLE[: len(WHOLE) // 2], "damaged or cut short", id="truncated"),
        pytest.param(b"<html>not found</html>", "damaged or cut short", id="not-gzip"),
        pytest.param(
            WHOLE[:20] + b"\xff" + WHOLE[21:], "damaged|unpacks to more|not the published", id="a-bit-flipped"
        ),
        pytest.param(b"", "not the published file|damaged", id="empty"),
        pytest.param(gzip.compress(CONTENT[::-1]), "not the published file", id="another-file"),
        pytest.param(gzip.compress(bytes(2**26), 1), "unpacks to more than", id="a-bomb"),
    ],
)
def test_a_wrong_file_is_refused_and_left_as_it_is(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / FILE.name
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        find(FILE, tmp_path, ["http://127.0.0.1:9/"])
    assert path.read_bytes() == content


def test_data_are_looked_for_where_asked_then_in_the_environment_then_in_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QUINTET_DATA", "/elsewhere")
    assert data_folder(Path("here")) == Path("here")
    assert data_folder() == Path("/elsewhere")
    monkeypatch.delenv("QUINTET_DATA")
    assert data_folder() == Path.home() / ".cache" / "quintet" / "data"


def test_own_digits_are_read_without_a_checksum_and_refused_with_one(data_folder: Path) -> None:
    images, labels = load_mnist(data_folder, "train", verify=False)
    assert images.shape == (700, 28, 28)
    assert images.dtype == labels.dtype == np.uint8
    with pytest.raises(TrainingError, match="not the published file"):
        load_mnist(data_folder, "train")


BLANK = np.zeros((3, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        pytest.param(idx(BLANK), idx(np.zeros(2, np.uint8)), "one label", id="a-label-missing"),
        pytest.param(idx(BLANK), idx(np.array([1, 2, 10], np.uint8)), "one label", id="a-label-of-ten"),
        pytest.param(idx(BLANK[:, 1:]), idx(np.zeros(3, np.uint8)), "28x28 is needed", id="wrong-size"),
        pytest.param(idx(BLANK[:0]), idx(np.zeros(0, np.uint8)), "one label", id="no-digits"),
        pytest.param(idx(np.zeros(3, np.uint8)), idx(np.zeros(3, np.uint8)), "not an IDX", id="wrong-axes"),
        pytest.param(
            gzip.compress(gzip.decompress(idx(BLANK))[:-5]),
            idx(np.zeros(3, np.uint8)),
            "cut short",
            id="short",
        ),
    ],
)
def test_own_digits_in_disorder_are_refused(
    images: bytes, labels: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "mnist").mkdir()
    for file, content in zip(PUBLISHED["test"], (images, labels), strict=True):
        (tmp_path / "mnist" / file.name).write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        load_mnist(tmp_path, "test", verify=False)
