"""The detection room: a microscope picture of blood in, a box around each cell out.

The network sees a fixed canvas, 512x384: any picture is shrunk or enlarged onto it with
its aspect kept, and what is left over is filled. The graph itself picks the likeliest
boxes; here overlapping ones are thinned out and brought back to the picture's own pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from service.models import pictures
from service.models.pictures import Pixels
from service.models.spec import Array, Inputs, Option, Room, Sample, Tensor

LABELS = ("RBC", "WBC", "Platelets")
"""As the data set spells red cells, white cells and platelets."""

WIDTH, HEIGHT = 512, 384
"""The canvas, in pixels: the shape of the 640x480 pictures that the network learns from."""

CANDIDATES = 128
"""How many boxes the graph hands over; a crowded picture holds some thirty cells."""

FILL = (188, 178, 182)
"""What surrounds a picture of another shape: the mean colour of the training pictures, RGB."""

LARGEST_OVERLAP = 0.55
"""Two boxes of one kind that share more (intersection over union) are one cell seen twice."""

LEAST_CONFIDENCE = 0.01
"""What is below is noise: the graph does not give it. Machines that name no `min_confidence` get
all the rest, which is what a precision-recall curve needs; people get from 0.5 on."""


LARGEST_DRAWING = 2048

COLOURS = ((200, 40, 40), (30, 80, 210), (10, 120, 60))
"""What each label is drawn in, RGB: red, blue, green."""

FONT = cv2.FONT_HERSHEY_SIMPLEX


class Fit(NamedTuple):
    """A picture's own size and its size on the canvas, where it lies in the upper left corner."""

    width: int
    height: int
    canvas_width: int
    canvas_height: int


class Context(NamedTuple):
    """What `to_answer` must know of a picture and its caller."""

    fit: Fit
    min_confidence: float


def letterbox(picture: Pixels) -> tuple[Pixels, Fit]:
    """Lay a picture on the canvas, in its upper left corner.

    Args:
        picture: uint8 RGB [height, width, 3], at least 1x1.

    Returns:
        uint8 RGB [384, 512, 3], and how the picture lies there.
    """
    height, width = picture.shape[:2]
    scale = min(WIDTH / width, HEIGHT / height)
    # A picture like a thread is still a pixel thick; no box on it can then be exact.
    fit = Fit(width, height, max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    canvas[:] = FILL
    canvas[: fit.canvas_height, : fit.canvas_width] = resized(picture, fit.canvas_width, fit.canvas_height)
    return canvas, fit


def resized(picture: Pixels, width: int, height: int) -> Pixels:
    """The picture in another size: averaged over areas where it shrinks, interpolated where it grows."""
    if picture.shape[:2] == (height, width):
        return picture
    shrinks = width < picture.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(picture, (width, height), interpolation=how)  # type: ignore[return-value]


def distinct(boxes: Array, confidence: Array, label: Array) -> npt.NDArray[np.intp]:
    """The boxes that remain when of two of one kind that overlap too much the surer one wins.

    Args:
        boxes: float [n, 4], xyxy.
        confidence: float [n].
        label: int [n].

    Returns:
        Indices of the remaining boxes, the surest first; of equals, the first.
    """
    order = np.argsort(-confidence, kind="stable")
    boxes, label = boxes[order], label[order]
    overlap = overlaps(boxes, boxes)
    rivals = (overlap > LARGEST_OVERLAP) & (label[:, None] == label[None, :])
    stays = np.ones(len(order), np.bool_)
    for index in range(len(order)):
        if stays[index]:
            stays[index + 1 :] &= ~rivals[index, index + 1 :]
    return order[stays]


def overlaps(one: Array, other: Array) -> Array:
    """Intersection over union of each box with each other one: xyxy [n, 4] and [m, 4] to [n, m]."""
    upper_left = np.maximum(one[:, None, :2], other[None, :, :2])
    lower_right = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.clip(lower_right - upper_left, 0, None).prod(axis=2)
    areas, other_areas = ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (one, other))
    together: Array = shared / np.maximum(areas[:, None] + other_areas[None, :] - shared, 1e-9)
    return together


@dataclass(slots=True)
class Detections:
    """The objects found in one picture, the surest first.

    Attributes:
        width: Of the picture as it is seen, in pixels.
        height: Likewise.
        boxes: float32 [m, 4], xyxy in the picture's pixels.
        confidence: float32 [m].
        label: int64 [m], places in `LABELS`.
    """

    width: int
    height: int
    boxes: npt.NDArray[np.float32]
    confidence: npt.NDArray[np.float32]
    label: npt.NDArray[np.int64]

    def as_json(self) -> dict[str, Any]:
        """`{"width", "height", "objects": [{"label", "confidence", "box"}]}`."""
        found = zip(self.label.tolist(), self.confidence.tolist(), self.boxes.tolist(), strict=True)
        return {
            "width": self.width,
            "height": self.height,
            "objects": [
                {"label": LABELS[label], "confidence": confidence, "box": box}
                for label, confidence, box in found
            ],
        }

    def as_tensor(self, name: str) -> Any:
        """`boxes` [m, 4], `confidence` [m], `label` [m] or their `count`."""
        return np.int64(len(self.label)) if name == "count" else getattr(self, name)


def to_tensor(inputs: Inputs) -> Sample:
    """An encoded picture to the canvas; `min_confidence`, where it is named, goes along for `to_answer`."""
    pixels, fit = letterbox(pictures.decode_colour(inputs["image"]))
    return Sample((pixels,), Context(fit, inputs.get("min_confidence", LEAST_CONFIDENCE)))


def to_answer(row: Sequence[Array], sample: Sample) -> Detections:
    """The graph's candidates to the objects of the picture, in its own pixels."""
    boxes, confidence, label = row
    fit, least = sample.context
    sure = confidence >= least
    boxes, confidence, label = boxes[sure].astype(np.float32), confidence[sure], label[sure]
    boxes = np.clip(boxes, 0, np.array([fit.canvas_width, fit.canvas_height] * 2, np.float32))
    # What lies on the filling has no area left.
    inside = ((boxes[:, 2:] - boxes[:, :2]) > 0.5).all(axis=1)
    boxes, confidence, label = boxes[inside], confidence[inside], label[inside]
    kept = distinct(boxes, confidence, label)
    scale = np.array([fit.width / fit.canvas_width, fit.height / fit.canvas_height] * 2, np.float32)
    return Detections(
        fit.width,
        fit.height,
        np.clip(boxes[kept] * scale, 0, np.array([fit.width, fit.height] * 2, np.float32)),
        confidence[kept].astype(np.float32),
        label[kept].astype(np.int64),
    )


def drawn(data: bytes, found: Detections) -> bytes:
    """A picture with what was found in it: a box around each object, its label and how sure it is.

    Args:
        data: The encoded picture.
        found: The answer to it.

    Returns:
        A PNG, of the picture's own size up to `LARGEST_DRAWING` pixels on its longer side.
    """
    picture = pictures.decode_colour(data)
    scale = min(1.0, LARGEST_DRAWING / max(found.width, found.height))
    picture = resized(picture, max(1, round(found.width * scale)), max(1, round(found.height * scale)))
    words = [f"{confidence:.0%}" for confidence in found.confidence.tolist()]
    with_boxes = draw_boxes(picture, found.boxes * scale, found.label, words)
    return cv2.imencode(".png", with_boxes[:, :, ::-1])[1].tobytes()


def draw_boxes(picture: Pixels, boxes: Array, label: Array, words: Sequence[str]) -> Pixels:
    """A copy of a picture with boxes drawn, the first on top.

    Args:
        picture: uint8 RGB [height, width, 3].
        boxes: float [n, 4], xyxy in its pixels.
        label: int [n], places in `LABELS`; each has its own colour.
        words: What to write beside the label of each.
    """
    canvas = np.ascontiguousarray(picture).copy()
    size = max(canvas.shape)
    line, letters = max(1, round(size / 400)), max(0.35, size / 1500)
    for box, kind, more in reversed(
        list(zip(np.rint(boxes).astype(int), label.tolist(), words, strict=True))
    ):
        left, top, right, bottom = box.tolist()
        colour, text = COLOURS[kind], f"{LABELS[kind]} {more}".rstrip()
        cv2.rectangle(canvas, (left, top), (right, bottom), colour, line)
        (long, high), under = cv2.getTextSize(text, FONT, letters, line)
        # On a plate above the box; where there is no room, inside.
        bottom_of_plate = top if top >= high + under else top + high + under
        left = max(0, min(left, canvas.shape[1] - long))
        plate = (left, bottom_of_plate - high - under), (left + long, bottom_of_plate)
        cv2.rectangle(canvas, *plate, colour, cv2.FILLED)
        where = (left, bottom_of_plate - under // 2)
        cv2.putText(canvas, text, where, FONT, letters, (255, 255, 255), line, cv2.LINE_AA)
    return canvas


def as_picture(inputs: Sequence[Inputs], answers: Sequence[Detections]) -> bytes:
    """The first picture with its boxes drawn, as PNG."""
    return drawn(inputs[0]["image"], answers[0])


def is_quick(inputs: Inputs) -> bool:
    """Small pictures are."""
    return pictures.is_quick(inputs["image"])


def is_short(inputs: Inputs) -> bool:
    """Slides are, which take a fifth of what the network does."""
    return pictures.has_at_most(pictures.SLIDE_PIXELS, inputs["image"])


def _painted_cells() -> bytes:
    """Three red cells, a white one and two platelets, painted as a stain shows them, as PNG."""
    slide = np.empty((240, 320, 3), np.uint8)
    slide[:] = (206, 204, 214)
    for x, y in ((60, 60), (70, 170), (255, 60)):
        cv2.circle(slide, (x, y), 26, (126, 122, 184), cv2.FILLED, cv2.LINE_AA)
        cv2.circle(slide, (x, y), 9, (160, 158, 200), cv2.FILLED, cv2.LINE_AA)
    cv2.circle(slide, (190, 140), 50, (196, 160, 180), cv2.FILLED, cv2.LINE_AA)
    for x, y in ((172, 126), (206, 130), (188, 158)):
        cv2.circle(slide, (x, y), 22, (150, 60, 96), cv2.FILLED, cv2.LINE_AA)
    for x, y in ((130, 40), (285, 190)):
        cv2.circle(slide, (x, y), 9, (160, 80, 120), cv2.FILLED, cv2.LINE_AA)
    return cv2.imencode(".png", cv2.GaussianBlur(slide, (0, 0), 1.2))[1].tobytes()


DETECTION = Room(
    name="detection",
    task="Finds the blood cells in a microscope picture.",
    takes="pictures",
    labels=LABELS,
    inputs=((Tensor("image", "BYTES"),),),
    outputs=(
        Tensor("boxes", "FP32", (-1, 4)),
        Tensor("confidence", "FP32", (-1,)),
        Tensor("label", "INT64", (-1,)),
        Tensor("count", "INT64"),
    ),
    network_inputs=(Tensor("pixels", "UINT8", (HEIGHT, WIDTH, 3)),),
    network_outputs=(
        Tensor("boxes", "FP32", (CANDIDATES, 4)),
        Tensor("confidence", "FP32", (CANDIDATES,)),
        Tensor("label", "INT64", (CANDIDATES,)),
    ),
    to_tensor=to_tensor,
    to_answer=to_answer,
    example={"image": _painted_cells()},
    is_quick=is_quick,
    is_short=is_short,
    options={
        "min_confidence": Option(
            0.5, 0.0, 1.0, "Objects that the network is less sure of are left out of the answer."
        )
    },
    as_picture=as_picture,
)
