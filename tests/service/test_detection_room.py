"""The detection room: whatever picture comes, its boxes come back in that picture's own pixels."""

import struct

import cv2
import numpy as np
import pytest

from service.errors import TooManyPixels, UnreadableImage
from service.models import detection
from service.models.detection import (
    CANDIDATES,
    DETECTION,
    HEIGHT,
    LABELS,
    LEAST_CONFIDENCE,
    WIDTH,
    distinct,
    letterbox,
    overlaps,
)
from service.models.spec import Array
from service.repository import Repository
from service.runtime import Network
from tests.cells import Pixels, slide
from tests.conftest import MODELS_FOLDER

Found = list[tuple[int, float, tuple[float, float, float, float]]]


def encoded(picture: Array, ending: str = ".png") -> bytes:
    return cv2.imencode(ending, picture)[1].tobytes()


def row_of(found: Found) -> tuple[Array, Array, Array]:
    """The graph's outputs for one picture: label, confidence and box on the canvas of each candidate."""
    boxes = np.zeros((CANDIDATES, 4), np.float32)
    confidence = np.zeros(CANDIDATES, np.float32)
    label = np.full(CANDIDATES, -1, np.int64)
    for number, (kind, sure, box) in enumerate(found):
        boxes[number], confidence[number], label[number] = box, sure, kind
    return boxes, confidence, label


def answer(picture: Array, found: Found, **options: float) -> detection.Detections:
    """The room's answer where the graph finds this in this picture."""
    sample = DETECTION.to_tensor({"image": encoded(picture), **options})
    return DETECTION.to_answer(row_of(found), sample)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("width", "height"),
    [(640, 480), (512, 384), (480, 640), (33, 21), (1, 1), (4000, 30), (30, 4000), (1, 3000), (1023, 767)],
)
def test_a_whole_picture_goes_onto_the_canvas_and_a_box_around_it_comes_back(width: int, height: int) -> None:
    picture = np.full((height, width, 3), 90, np.uint8)
    canvas, lies = letterbox(picture)
    assert (canvas.shape, canvas.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
    assert lies.canvas_width == WIDTH or lies.canvas_height == HEIGHT
    assert (canvas[: lies.canvas_height, : lies.canvas_width] == 90).all()
    assert (canvas[lies.canvas_height :] == detection.FILL).all()
    assert (canvas[:, lies.canvas_width :] == detection.FILL).all()
    found = answer(picture, [(0, 0.9, (0, 0, lies.canvas_width, lies.canvas_height))])
    assert (found.width, found.height) == (width, height)
    assert found.boxes.tolist() == [[0, 0, width, height]]


def test_boxes_come_back_to_the_pixel() -> None:
    """A dark square on the slide, found on the canvas by its own edges."""
    for width, height, box in ((1280, 960, (200, 300, 420, 500)), (300, 600, (120, 60, 180, 150))):
        picture = np.full((height, width, 3), 255, np.uint8)
        left, top, right, bottom = box
        picture[top:bottom, left:right] = 0
        dark = 255.0 - letterbox(picture)[0][:, :, 0]
        dark[:, letterbox(picture)[1].canvas_width :] = 0
        down, across = dark.max(axis=1), dark.max(axis=0)
        edges = (
            np.argmax(across > 0) + 1 - across[np.argmax(across > 0)] / 255,
            np.argmax(down > 0) + 1 - down[np.argmax(down > 0)] / 255,
        )
        sides = (across.sum() / 255, down.sum() / 255)
        on_canvas = (*edges, edges[0] + sides[0], edges[1] + sides[1])
        (found,) = answer(picture, [(1, 0.9, on_canvas)]).boxes.tolist()
        assert found == pytest.approx(box, abs=0.6)


def test_boxes_end_at_the_picture_and_what_lies_beside_it_is_left_out() -> None:
    picture = np.zeros((100, 400, 3), np.uint8)
    lies = letterbox(picture)[1]
    assert (lies.canvas_width, lies.canvas_height) == (512, 128)
    found = answer(picture, [(0, 0.9, (-20, 100, 100, 180)), (1, 0.8, (50, 200, 90, 300))])
    assert found.boxes.tolist() == [[0, pytest.approx(100 / 1.28), pytest.approx(100 / 1.28), 100]]
    assert found.as_json()["objects"][0]["label"] == "RBC"


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".bmp"])
def test_every_kind_of_picture(ending: str) -> None:
    picture, _ = slide(np.random.default_rng(0))
    seen = DETECTION.to_tensor({"image": encoded(picture[:, :, ::-1], ending)}).tensors[0].astype(int)
    assert np.abs(seen - letterbox(picture)[0]).mean() < 3


def test_grey_transparent_and_deep_pictures() -> None:
    grey = np.full((40, 60), 77, np.uint8)
    (canvas,) = DETECTION.to_tensor({"image": encoded(grey)}).tensors
    assert (canvas[:300, :400] == 77).all()
    clear = np.zeros((40, 60, 4), np.uint8)
    (canvas,) = DETECTION.to_tensor({"image": encoded(clear)}).tensors
    assert (canvas[:300, :400] == 255).all(), "what is transparent shows white paper"
    deep = np.full((40, 60, 3), 77 * 257, np.uint16)
    (canvas,) = DETECTION.to_tensor({"image": encoded(deep)}).tensors
    assert (canvas[:300, :400] == 77).all()


def turned_by_exif(picture: Pixels, orientation: int) -> bytes:
    """A JPEG that says how it is to be turned."""
    jpeg = encoded(picture, ".jpg")
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    tiff = b"MM\x00*" + struct.pack(">IH", 8, 1) + entry + struct.pack(">I", 0)
    block = b"Exif\x00\x00" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]


def test_a_turned_picture_is_seen_and_answered_upright() -> None:
    picture = np.full((60, 100, 3), 200, np.uint8)
    picture[:, :50] = 20
    sample = DETECTION.to_tensor({"image": turned_by_exif(picture, 6)})  # a quarter turn clockwise
    found = DETECTION.to_answer(row_of([(0, 0.9, (0, 0, 50, 50))]), sample).as_json()
    assert (found["width"], found["height"]) == (60, 100)
    assert sample.tensors[0][:150, :200].mean() < 40, "what was left is above"


def test_of_two_boxes_of_one_kind_on_one_cell_the_surer_stays() -> None:
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    found = answer(
        picture,
        [
            (0, 0.6, (100, 100, 200, 200)),
            (0, 0.9, (104, 98, 204, 202)),
            (1, 0.7, (102, 100, 202, 200)),
            (0, 0.5, (160, 100, 260, 200)),
        ],
    )
    assert found.confidence.tolist() == pytest.approx([0.9, 0.7, 0.5])
    assert [LABELS[kind] for kind in found.label] == ["RBC", "WBC", "RBC"]
    assert found.boxes[0].tolist() == [104, 98, 204, 202]


def test_suppression_agrees_with_opencv() -> None:
    chance = np.random.default_rng(3)
    corners = chance.uniform(0, 300, (100, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + chance.uniform(20, 120, (100, 2))], axis=1).astype(np.float32)
    confidence = chance.permutation(np.linspace(0.1, 0.9, 100)).astype(np.float32)
    label = chance.integers(0, 3, 100)
    as_opencv = [[box[0], box[1], box[2] - box[0], box[3] - box[1]] for box in boxes.tolist()]
    wanted = cv2.dnn.NMSBoxesBatched(
        as_opencv, confidence.tolist(), label.tolist(), 0.0, detection.LARGEST_OVERLAP
    )
    assert sorted(distinct(boxes, confidence, label).tolist()) == sorted(np.ravel(wanted).tolist())


def test_nothing_to_suppress() -> None:
    nothing = np.zeros((0, 4), np.float32)
    assert len(distinct(nothing, np.zeros(0), np.zeros(0))) == 0
    assert overlaps(nothing, np.ones((2, 4))).shape == (0, 2)
    assert overlaps(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [[0.0]]


def test_min_confidence_leaves_out_what_is_less_sure() -> None:
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    found: Found = [(0, 0.9, (0, 0, 50, 50)), (0, 0.5, (100, 0, 150, 50)), (2, 0.02, (200, 0, 220, 20))]
    counts = {
        least: len(answer(picture, found, min_confidence=least).label) for least in (0.0, 0.5, 0.6, 1.0)
    }
    assert counts == {0.0: 3, 0.5: 2, 0.6: 1, 1.0: 0}
    assert len(answer(picture, found).label) == 3, "who names none gets all"
    assert DETECTION.options["min_confidence"].default == 0.5, "but people get what is likely"


def test_padding_is_never_an_object() -> None:
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    found = answer(picture, [], min_confidence=0.0)
    assert found.as_json() == {"width": WIDTH, "height": HEIGHT, "objects": []}
    assert {tensor.name: np.shape(found.as_tensor(tensor.name)) for tensor in DETECTION.outputs} == {
        "boxes": (0, 4),
        "confidence": (0,),
        "label": (0,),
        "count": (),
    }


def test_tensors_have_the_types_that_the_room_promises() -> None:
    found = answer(np.zeros((90, 120, 3), np.uint8), [(2, 0.7, (10, 10, 40, 40))])
    for tensor in DETECTION.outputs:
        value = np.asarray(found.as_tensor(tensor.name))
        assert value.dtype == tensor.dtype
        assert len(value.shape) == len(tensor.shape)
    assert int(found.as_tensor("count")) == 1
    assert found.as_tensor("confidence")[0] >= LEAST_CONFIDENCE


@pytest.mark.parametrize(("width", "height"), [(640, 480), (20, 16), (1, 1), (5000, 40)])
def test_boxes_are_drawn_into_the_picture(width: int, height: int) -> None:
    picture = np.full((height, width, 3), 230, np.uint8)
    found = answer(
        picture, [(0, 0.93, (0, 0, 60, 50)), (1, 0.8, (100, 30, 300, 200)), (2, 0.7, (500, 0, 512, 3))]
    )
    assert DETECTION.as_picture is not None
    png = DETECTION.as_picture([{"image": encoded(picture)}, {"image": b"never read"}], [found, found])
    drawn = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert png.startswith(b"\x89PNG")
    scale = min(1, detection.LARGEST_DRAWING / max(width, height))
    assert drawn.shape == (max(1, round(height * scale)), max(1, round(width * scale)), 3)
    if (width, height) == (640, 480):
        for box, kind in zip(found.boxes, found.label, strict=True):
            x, y = int(box[0]), round((box[1] + box[3]) / 2)
            assert tuple(drawn[y, x]) == detection.COLOURS[kind]
        assert (drawn[200:300, 10:100] == 230).all(), "what is in no box stays as it was"


def test_drawing_leaves_the_answer_as_it_is() -> None:
    picture, _ = slide(np.random.default_rng(1))
    found = answer(picture[:, :, ::-1], [(0, 0.93, (10, 10, 60, 50))])
    before = found.as_json()
    detection.drawn(encoded(picture), found)
    assert found.as_json() == before


@pytest.mark.parametrize("data", [b"", b"no picture", encoded(np.zeros((9, 9, 3), np.uint8))[:60]])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableImage):
        DETECTION.to_tensor({"image": data})
    assert DETECTION.is_quick({"image": data})


def test_too_many_pixels_are_refused() -> None:
    huge = encoded(np.zeros((6000, 6000), np.uint8))
    with pytest.raises(TooManyPixels):
        DETECTION.to_tensor({"image": huge})
    assert not DETECTION.is_short({"image": huge})
    assert DETECTION.is_short({"image": encoded(np.zeros((480, 640), np.uint8))})


def test_the_example_is_a_small_picture_of_cells() -> None:
    sample = DETECTION.to_tensor(DETECTION.example)
    assert sample.tensors[0].shape == (HEIGHT, WIDTH, 3)
    assert len(DETECTION.example["image"]) < 30_000


def test_the_shipped_network_finds_the_painted_cells() -> None:
    sample = DETECTION.to_tensor({**DETECTION.example, "min_confidence": 0.3})
    network = Network(DETECTION, Repository(MODELS_FOLDER).open("detection").network)
    found = DETECTION.to_answer(network.run([sample])[0], sample).as_json()["objects"]
    assert sorted(one["label"] for one in found) == ["Platelets"] * 2 + ["RBC"] * 3 + ["WBC"]
    white = next(one["box"] for one in found if one["label"] == "WBC")
    assert white == pytest.approx([140, 90, 240, 190], abs=8), "in the example's own pixels"
