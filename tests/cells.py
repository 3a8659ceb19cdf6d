"""Painted blood: pictures with cells whose boxes are known, and a data folder of them in BCCD's layout."""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

LOOKS = {"RBC": (24, (184, 122, 126)), "WBC": (44, (120, 70, 150)), "Platelets": (9, (110, 50, 140))}
"""Radius in pixels and colour (RGB) of each kind, on a 320x240 slide."""


def slide(
    chance: np.random.Generator, width: int = 320, height: int = 240
) -> tuple[Pixels, list[tuple[str, list[int]]]]:
    """A slide uint8 RGB [height, width, 3] and the name and box (xyxy) of each cell on it."""
    picture = np.full((height, width, 3), (214, 204, 206), np.uint8)
    cells: list[tuple[str, list[int]]] = []
    taken: list[tuple[int, int, int]] = []
    for name, count in (("WBC", 1), ("RBC", 5), ("Platelets", 2)):
        radius, colour = LOOKS[name]
        for _ in range(count):
            for _ in range(50):
                x = int(chance.integers(radius, width - radius))
                y = int(chance.integers(radius, height - radius))
                if all((x - a) ** 2 + (y - b) ** 2 > (radius + c + 2) ** 2 for a, b, c in taken):
                    break
            else:
                continue
            taken.append((x, y, radius))
            cv2.circle(picture, (x, y), radius, colour, cv2.FILLED, cv2.LINE_AA)
            cells.append((name, [x - radius, y - radius, x + radius, y + radius]))
    return picture, cells


def voc(cells: list[tuple[str, list[int]]]) -> str:
    """Cells as an annotation of PASCAL VOC's form."""
    sides = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        f"<object><name>{name}</name><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, box, strict=True))
        + "</bndbox></object>"
        for name, box in cells
    )
    return f"<annotation>{objects}</annotation>"


def write_slides(folder: Path, counts: dict[str, int]) -> Path:
    """So many slides of each split, as `BCCD/` in a data folder; gives that folder."""
    chance = np.random.default_rng(7)
    home = folder / "BCCD"
    for part in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (home / part).mkdir(parents=True)
    for split, count in counts.items():
        names = [f"{split}_{number:03}" for number in range(count)]
        (home / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            picture, cells = slide(chance)
            (home / "Annotations" / f"{name}.xml").write_text(voc(cells))
            cv2.imwrite(str(home / "JPEGImages" / f"{name}.jpg"), picture[:, :, ::-1])
    return folder
