"""Results read well, can be looked at, and can be kept."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from quintet_client import Classification, Client, Detection, Generated, Object

from .stand_in import GOOD, HttpStandIn

SEVEN = Classification("7", 0.99812, {"1": 0.0015, "7": 0.99812}, "digit", "1")


def cells(size: tuple[int, int] = (64, 48), orientation: int = 1) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, "white").save(file, "PNG", exif=exif)
    return file.getvalue()


def found(picture: bytes) -> Detection:
    boxes = [
        Object("WBC", 0.9, (4, 4, 40, 30)),
        Object("RBC", 0.8, (20, 20, 60, 44)),
        Object("RBC", 0.7, (0, 0, 9, 9)),
    ]
    return Detection(64, 48, tuple(boxes), "detection", "1", picture=picture)


def test_every_result_reads_well() -> None:
    drawn = Generated(3, 7, b"", "generator", "1")
    assert repr(SEVEN) == "<digit 1: '7' 99.8 %, '1' 0.1 %>"
    assert str(SEVEN) == "7 (99.8 %)"
    assert repr(found(b"")) == "<detection 1: 2 RBC, 1 WBC in 64×48>"  # noqa: RUF001
    assert repr(found(b"").objects[0]) == "<WBC 90.0 % at 4,4 to 40,30>"
    assert str(Detection(1, 1, (), "detection", "1")) == "nothing found"
    assert repr(drawn) == "<generator 1: a 3, seed 7>"


def test_the_likeliest_comes_first() -> None:
    assert [label for label, _ in SEVEN.ranked()] == ["7", "1"]


def test_how_long_it_took_is_no_part_of_an_answer() -> None:
    late = Classification("7", 0.99812, {"1": 0.0015, "7": 0.99812}, "digit", "1", seconds=9)
    assert late == SEVEN


def test_boxes_are_drawn_in_a_colour_for_each_label() -> None:
    picture = np.asarray(found(cells()).draw())
    assert picture.shape == (48, 64, 3)
    assert tuple(picture[30, 20]) != tuple(picture[44, 40]) != (255, 255, 255)
    assert tuple(picture[40, 10]) == (255, 255, 255)


def test_a_turned_photograph_is_drawn_upright() -> None:
    assert found(cells((48, 64), orientation=6)).draw().size == (64, 48)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_drawing_is_kept(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"boxes.{ending}"
    found(cells()).save(path)
    with Image.open(path) as kept:
        assert kept.size == (64, 48)


def test_what_was_asked_about_is_at_hand_for_drawing() -> None:
    body = b"""{"model": "detection", "version": "1", "predictions": [{"width": 64, "height": 48, "objects": [
        {"label": "WBC", "confidence": 0.9, "box": [4, 4, 40, 30]}]}]}"""
    with HttpStandIn([GOOD], body=body) as server, Client(server.url) as quintet:
        assert quintet.detection(cells()).draw().size == (64, 48)
