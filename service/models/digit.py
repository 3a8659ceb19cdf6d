"""The digit room: any picture of a handwritten digit in, the digit it shows out.

The network knows MNIST: 28x28, light ink on black, the digit scaled to 20 pixels
and its centre of mass in the middle (LeCun et al., *Gradient-Based Learning Applied
to Document Recognition*, 1998, section III.A). `like_mnist` brings any picture there.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from service.errors import QuintetError
from service.models import pictures
from service.models.pictures import Pixels
from service.models.spec import Array, Classification, Inputs, Room, Sample, Tensor, each

SIDE = 28
LABELS = tuple("0123456789")

INK_SIDE = 20
"""The longer side of a digit's box in MNIST, in pixels."""

WORKING_SIDE = 320
"""Larger pictures are shrunk to this first: even a digit a tenth as wide keeps all it needs."""

EVEN_LEVELS = 2
"""Paper whose grey levels differ by no more than this from their commonest is even."""

LEANS = (0.0, *(side * degrees / 57.3 for degrees in (0.6, 1.2, 1.8, 2.4, 3.0, 3.6) for side in (1, -1)))
"""Slopes at which ruled lines are looked for; of equals, the first."""

THINNEST_STROKE = 1.8
"""In pixels of the finished picture; finer strokes would fade into the background."""

MOMENTS = np.stack(
    [np.ones((SIDE, SIDE)), *np.meshgrid(np.arange(SIDE), np.arange(SIDE))], axis=-1, dtype=np.float32
).reshape(-1, 3)
"""What the pixels of [28, 28], laid in a row, are multiplied by for their mass and first moments."""

BLACK_CORNERS, WHITE_CORNERS = [0] * 4, [255] * 4


def like_mnist(picture: Pixels) -> Pixels:
    """Bring a grey picture of a digit to what MNIST looks like.

    Dark on light or light on dark, of any size, off-centre, photographed under uneven
    light, on ruled paper, thick or thin: out comes light ink on black, its longer side
    20 pixels, its centre of mass in the middle. What already is so comes through
    unchanged, or inverted; a picture without ink comes out black.

    Args:
        picture: uint8 [height, width], at least 1x1.

    Returns:
        uint8 [28, 28].
    """
    (alike,) = all_like_mnist((picture,))
    return alike


def all_like_mnist(pictures: Sequence[Pixels]) -> list[Pixels]:
    """Bring several pictures to what MNIST looks like, as `like_mnist` does each, and faster."""
    small = [picture for picture in pictures if picture.shape == (SIDE, SIDE)]
    ready = iter(_already_like_mnist(small) if small else ())
    alike = []
    for picture in pictures:
        found = next(ready) if picture.shape == (SIDE, SIDE) else None
        alike.append(_made_like_mnist(picture) if found is None else found)
    return alike


def _made_like_mnist(picture: Pixels) -> Pixels:
    # OpenCV misreads views that repeat one row; decoded pictures are never views.
    picture = _shrunk(np.ascontiguousarray(picture), WORKING_SIDE)
    paper = _even_paper(picture)
    if paper is not None:
        ink = _lifted_off(picture, paper, is_photograph=False)
        return _centred(_only_the_digit(_without_ruling(ink), faintest=24))
    # Fine strokes allow a close look at the paper, which follows shadows; thick ones a distant one.
    looks = [_lifted_off(picture, _uneven_paper(picture, near), is_photograph=True) for near in (True, False)]
    ink = max(looks, key=_plausibility)
    return _centred(_only_the_digit(_without_ruling(ink), faintest=64))


def _already_like_mnist(pictures: Sequence[Pixels]) -> list[Pixels | None]:
    """Each picture of uint8 [28, 28] as it is, or inverted, where that is MNIST's format; None elsewhere.

    All of MNIST's 70,000 pictures have black corners, ink 19 or 20 pixels long and
    their centre of mass within 0.52 pixels of (14, 14).
    """
    # Together: most of what these small steps take is numpy's own, once a call.
    stack = np.concatenate(pictures).reshape(-1, SIDE, SIDE)
    corners = stack[:, :: SIDE - 1, :: SIDE - 1].reshape(-1, 4).tolist()
    if WHITE_CORNERS in corners:
        for picture, four in zip(stack, corners, strict=True):
            if four == WHITE_CORNERS:
                cv2.bitwise_not(picture, picture)
    # All sums are whole numbers that float32 holds exactly.
    moments = (stack.reshape(-1, SIDE * SIDE) @ MOMENTS).tolist()
    return [
        picture if four in (BLACK_CORNERS, WHITE_CORNERS) and _is_centred(picture, *three) else None
        for picture, four, three in zip(stack, corners, moments, strict=True)
    ]


def _is_centred(picture: Pixels, mass: float, right: float, down: float) -> bool:
    """Whether ink of this mass and these first moments is as large as MNIST's and in the middle."""
    _, _, width, height = cv2.boundingRect(picture)
    return (
        max(width, height) in (INK_SIDE - 1, INK_SIDE)
        and abs(right / mass - SIDE / 2) < 0.55
        and abs(down / mass - SIDE / 2) < 0.55
    )


def _shrunk(picture: Pixels, longest: int) -> Pixels:
    """The picture with neither side above `longest` pixels."""
    height, width = picture.shape
    scale = longest / max(height, width)
    if scale >= 1:
        return picture
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]


def _even_paper(picture: Pixels) -> Array | None:
    """The one grey level of a drawing's or scan's paper, as float32 [1, 1]; None if there is none.

    Paper is the level that most pixels share, within a little, those on the border
    counting as much as all others together: a fat digit may cover more than the paper does.
    What is found on the border alone is a frame.
    """
    everywhere = np.bincount(picture.ravel(), minlength=256) / picture.size
    border = _border(picture)
    on_border = np.bincount(border, minlength=256) / border.size
    nearby = np.ones(2 * EVEN_LEVELS + 1)
    shares = np.convolve(everywhere, nearby, "same")
    shares += np.convolve(on_border, nearby, "same") * (shares > 0.15)
    if shares.max() < 0.8 and min(picture.shape) >= SIDE:
        return None
    first = max(0, int(shares.argmax()) - EVEN_LEVELS)
    levels = (everywhere + on_border)[first : int(shares.argmax()) + EVEN_LEVELS + 1]
    return np.full((1, 1), first + int(levels.argmax()), np.float32)


def _border(picture: Pixels) -> Pixels:
    """The outermost pixels, uint8 [n], those of the corners twice."""
    return np.concatenate((picture[0], picture[-1], picture[:, 0], picture[:, -1]))


def _uneven_paper(picture: Pixels, is_near: bool) -> Array:
    """What a photograph would show without the ink, float32 [height, width].

    First guess: the median, over a third of the picture or over all of it. What differs
    most from it is ink; the second guess is the smooth surface through everything else.
    """
    small = _shrunk(picture, 96)
    height, width = small.shape
    if is_near:
        guess = cv2.medianBlur(small, max(3, min(height, width) // 3 | 1))
    else:
        guess = np.full_like(small, np.median(small))
    _, inked = cv2.threshold(cv2.absdiff(small, guess), 0, 1, cv2.THRESH_OTSU)
    bare = 1.0 - cv2.dilate(inked, np.ones((3, 3), np.uint8)).astype(np.float32) + 1e-3
    reach = max(height, width) / 12
    weights = cv2.GaussianBlur(bare, (0, 0), reach)
    surface = cv2.GaussianBlur(small.astype(np.float32) * bare, (0, 0), reach) / weights
    size = (picture.shape[1], picture.shape[0])
    return cv2.resize(surface.astype(np.float32, copy=False), size, interpolation=cv2.INTER_LINEAR)


def _lifted_off(picture: Pixels, paper: Array, *, is_photograph: bool) -> Pixels:
    """The ink without the paper, stretched to 0..255.

    Ink departs from the paper to one side; what departs to the other side is noise,
    and says how much of the ink's side is noise as well.
    """
    darker: Array = paper - picture
    squares = np.square(darker)
    if float(squares.sum(where=darker > 0)) * 2 < float(squares.sum()):
        ink = -darker
    elif is_photograph:
        # Ink takes away a share of the light: in a shadow it takes less.
        ink = darker * (255 / np.maximum(paper, 32))
    else:
        ink = darker
    noise = 0.0
    if is_photograph:
        ink = np.asarray(cv2.GaussianBlur(ink, (3, 3), 0))
        wrong_side = -ink[ink < 0]
        noise = 1.25 * float(np.percentile(wrong_side, 95)) if wrong_side.size else 0.0
    strongest = float(ink.max())
    if strongest <= max(noise, 2.0):
        return np.zeros(picture.shape, np.uint8)
    if is_photograph:
        full = ink[ink > (noise + strongest) / 2]
        strongest = float(np.percentile(full, 75))
    stretched: Pixels = np.clip((ink - noise) * (255 / (strongest - noise)), 0, 255).astype(np.uint8)
    return stretched


def _plausibility(ink: Pixels) -> float:
    """How much this looks like strokes on paper, up to 1.

    Ink and paper should fall into two classes (their separation is Otsu's, *A Threshold
    Selection Method from Gray-Level Histograms*, 1979), and a shadow mistaken for ink
    gives itself away by how much of the border it covers.
    """
    _, inked = cv2.threshold(ink, 0, 1, cv2.THRESH_OTSU)
    share, spread = float(inked.mean()), float(ink.var())
    if spread == 0 or share in (0.0, 1.0):
        return 0.0
    apart = cv2.mean(ink, inked)[0] - cv2.mean(ink, 1 - inked)[0]
    return share * (1 - share) * apart**2 / spread - float(_border(np.asarray(inked, np.uint8)).mean())


def _without_ruling(ink: Pixels) -> Pixels:
    """Without the paper's own lines, ruled or squared: uint8 [height, width].

    They are long, thin, nearly level or upright, and fainter than the strokes. In a small
    picture they cannot be told from the strokes' own soft edges.
    """
    if min(ink.shape) < 2 * SIDE:
        return ink
    if ink[:, 0].any() and ink[:, -1].any():
        ink = _without_rows(ink)
    if ink[0].any() and ink[-1].any():
        ink = np.ascontiguousarray(_without_rows(np.ascontiguousarray(ink.T)).T)
    return ink


def _without_rows(ink: Pixels) -> Pixels:
    """Without the lines that run from left to right, all at one small angle."""

    def sharpness(lean: float) -> float:
        return float(cv2.reduce(_sheared(ink, lean), 1, cv2.REDUCE_AVG, dtype=cv2.CV_32F).var())

    lean = max(LEANS, key=sharpness)
    # Thickened by a pixel before, so that a line need not be perfectly straight.
    level = cv2.dilate(_sheared(ink, lean), np.ones((3, 1), np.uint8))
    # Only what is thin: in a picture cropped to its digit, strokes run as far as lines do.
    # The sides are odd, for OpenCV would move what it opens with an even one by a pixel.
    upright, along = max(7, ink.shape[0] // 16 | 1), ink.shape[1] * 3 // 5 | 1
    thin = cv2.morphologyEx(level, cv2.MORPH_TOPHAT, np.ones((upright, 1), np.uint8))
    lines = cv2.morphologyEx(thin, cv2.MORPH_OPEN, np.ones((1, along), np.uint8))
    lines[lines > 180] = 0
    return np.where(ink > _sheared(np.asarray(lines, np.uint8), -lean) * 1.4, ink, 0).astype(np.uint8)


def _sheared(ink: Pixels, lean: float) -> Pixels:
    """Turned by a small slope, column by column, about the middle; the ends are repeated."""
    height, width = ink.shape
    shear = np.array([[1, 0, 0], [-lean, 1, lean * width / 2]], np.float32)
    return cv2.warpAffine(ink, shear, (width, height), borderMode=cv2.BORDER_REPLICATE)  # type: ignore[return-value]


def _only_the_digit(ink: Pixels, faintest: int) -> Pixels:
    """Without specks, and without what reaches in from beyond the border: uint8 [height, width].

    Args:
        ink: uint8 [height, width].
        faintest: What has less ink than this is not counted as part of a stroke.
    """
    _, inked = cv2.threshold(ink, faintest, 1, cv2.THRESH_BINARY)
    count, parts, boxes, _ = cv2.connectedComponentsWithStats(inked, connectivity=8)
    soft_edge = np.ones((3, 3), np.uint8)
    if count <= 2:
        return cv2.multiply(ink, cv2.dilate(inked, soft_edge))  # type: ignore[return-value]
    height, width = ink.shape
    left, top = boxes[:, cv2.CC_STAT_LEFT], boxes[:, cv2.CC_STAT_TOP]
    right, bottom = left + boxes[:, cv2.CC_STAT_WIDTH], top + boxes[:, cv2.CC_STAT_HEIGHT]
    inside = (left > 0) & (top > 0) & (right < width) & (bottom < height)
    areas = boxes[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0
    main = int(areas.argmax())
    largest, largest_inside = int(areas[main]), int((areas * inside).max())
    keep = areas >= largest * 0.04
    # A digit may be cut by the border, but a frame or a shadow that only passes by is no digit.
    spans = (left[main] == 0 and right[main] == width) or (top[main] == 0 and bottom[main] == height)
    if largest_inside >= largest * (0.03 if spans else 0.15):
        keep = (areas >= largest_inside * 0.04) & inside
    # Around what is kept, a pixel of soft edge is kept too.
    near = cv2.dilate(keep.astype(np.uint8)[parts], soft_edge)
    return cv2.multiply(ink, near)  # type: ignore[return-value]


def _centred(ink: Pixels) -> Pixels:
    """Ink of any size, scaled to 20 pixels and laid with its centre of mass in the middle of [28, 28]."""
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    left, top, width, height = cv2.boundingRect(cv2.threshold(ink, 24, 255, cv2.THRESH_BINARY)[1])
    if width == 0:
        return canvas
    ink = _thick_enough(ink[top : top + height, left : left + width])
    height, width = ink.shape
    scale = INK_SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    digit = cv2.resize(ink, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    digit = cv2.convertScaleAbs(digit, alpha=255 / max(1, int(digit.max())))
    moments = cv2.moments(digit)
    x = round(SIDE / 2 - moments["m10"] / moments["m00"])
    y = round(SIDE / 2 - moments["m01"] / moments["m00"])
    x, y = min(max(x, 0), SIDE - size[0]), min(max(y, 0), SIDE - size[1])
    canvas[y : y + size[1], x : x + size[0]] = digit
    return canvas


def _thick_enough(ink: Pixels) -> Pixels:
    """A fine pen's strokes, widened so that they survive the scaling; the box may grow with them."""
    _, solid = cv2.threshold(ink, 127, 1, cv2.THRESH_BINARY)
    depth = cv2.distanceTransform(solid, cv2.DIST_L2, 3)
    area = cv2.countNonZero(solid)
    if area == 0:
        return ink
    # Across a stroke of width w the depth climbs to w / 2 and falls again: its mean is w / 4.
    stroke = 4 * cv2.sumElems(depth)[0] / area * INK_SIDE / max(ink.shape)
    missing = round((THINNEST_STROKE - stroke) * max(ink.shape) / INK_SIDE)
    if missing < 1:
        return ink
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (missing + 1, missing + 1))
    wide = np.asarray(cv2.dilate(np.pad(ink, missing // 2 + 1), brush), np.uint8)
    left, top, width, height = cv2.boundingRect(wide)
    return wide[top : top + height, left : left + width]


def to_tensor(inputs: Inputs) -> Sample:
    """An encoded picture, or pixels already like MNIST's, to the network's input."""
    pixels = inputs.get("pixels")
    return Sample((like_mnist(_decoded(inputs)) if pixels is None else pixels,))


def to_tensors(several: Sequence[Inputs]) -> list[Sample | QuintetError]:
    """Each input's sample, or what is wrong with it; of pictures several at once."""
    encoded = [inputs for inputs in several if "pixels" not in inputs]
    decoded = each(_decoded, encoded)
    alike = iter(all_like_mnist([one for one in decoded if not isinstance(one, QuintetError)]))
    samples = iter([one if isinstance(one, QuintetError) else Sample((next(alike),)) for one in decoded])
    return [Sample((inputs["pixels"],)) if "pixels" in inputs else next(samples) for inputs in several]


def _decoded(inputs: Inputs) -> Pixels:
    return pictures.decode_grey(inputs["image"])


def to_answer(row: Sequence[Array], sample: Sample) -> Classification:
    """Ten probabilities to the digit they point at."""
    return Classification(LABELS, row[0])


def is_quick(inputs: Inputs) -> bool:
    """Small pictures and ready pixels are."""
    return "image" not in inputs or pictures.is_quick(inputs["image"])


def _drawn_seven() -> bytes:
    """A seven in three strokes of a pen on white paper, as PNG."""
    paper = np.full((96, 96), 255, np.uint8)
    strokes = np.array([[30, 22], [66, 20], [44, 74]], np.int32)
    cv2.polylines(paper, [strokes], isClosed=False, color=20, thickness=5, lineType=cv2.LINE_AA)
    return cv2.imencode(".png", paper)[1].tobytes()


DIGIT = Room(
    name="digit",
    task="Reads the handwritten digit in a picture.",
    takes="pictures",
    labels=LABELS,
    inputs=((Tensor("pixels", "UINT8", (SIDE, SIDE)),), (Tensor("image", "BYTES"),)),
    outputs=(Tensor("label", "BYTES"), Tensor("probabilities", "FP32", (len(LABELS),))),
    network_inputs=(Tensor("pixels", "UINT8", (SIDE, SIDE)),),
    network_outputs=(Tensor("probabilities", "FP32", (len(LABELS),)),),
    to_tensor=to_tensor,
    to_tensors=to_tensors,
    to_answer=to_answer,
    example={"image": _drawn_seven()},
    is_quick=is_quick,
    is_short=is_quick,
)
