"""The detection story: what it reads, how it distorts, whom it holds to account, and real small runs."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch

from export.to_onnx import to_onnx
from service.models import detection as room
from service.models.detection import CANDIDATES, DETECTION, HEIGHT, LABELS, WIDTH
from tests.cells import voc, write_slides
from training import detection
from training.__main__ import main
from training.card import read_checkpoint
from training.detection import (
    ARCHITECTURES,
    COLUMNS,
    ROWS,
    Annotated,
    Batch,
    Distortion,
    apart,
    assign,
    average_precision,
    batch_of,
    box_loss,
    digest,
    distort,
    load_bccd,
    middles,
    read_voc,
)
from training.errors import TrainingError

from .conftest import ROOT

SMALL = ("--epochs", "2", "--batch-size", "4", "--precision", "fp32")


@pytest.fixture(scope="session")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with four painted slides to learn from and three to be tested on."""
    return write_slides(tmp_path_factory.mktemp("slides"), {"train": 4, "val": 3})


@pytest.fixture(scope="session")
def truth(slides: Path) -> list[Annotated]:
    return load_bccd(slides, "train", verify=False)


# ---- data ----


def test_pictures_come_with_their_boxes(truth: list[Annotated]) -> None:
    assert len(truth) == 4
    for example in truth:
        assert example.pixels.shape == (240, 320, 3)
        assert (example.boxes.dtype, example.labels.dtype) == (np.float32, np.int64)
        assert (example.boxes[:, 2:] > example.boxes[:, :2]).all()
        for box, label in zip(example.boxes.astype(int), example.labels, strict=True):
            x, y = (box[:2] + box[2:]) // 2
            assert example.pixels[y, x].astype(int).sum() < 550, "there is a cell in the middle of its box"
            assert 0 <= label < len(LABELS)


def test_the_checksum_notices_pictures_and_boxes(truth: list[Annotated]) -> None:
    moved = truth[0]._replace(boxes=truth[0].boxes + 1)
    retaken = truth[0]._replace(sha256="0" * 64)
    assert len({digest(truth), digest([moved, *truth[1:]]), digest([retaken, *truth[1:]])}) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("<annotation><object>", "is damaged", id="cut-short"),
        pytest.param("not xml", "is damaged", id="no-xml"),
        pytest.param(voc([("Neutrophil", [1, 2, 3, 4])]), "marks a 'Neutrophil'", id="unknown-cell"),
        pytest.param(voc([("RBC", [1, 2, "x", 4])]), "is damaged", id="no-number"),  # type: ignore[list-item]
        pytest.param(voc([("RBC", [1, 2, "nan", 4])]), "is damaged", id="nan"),  # type: ignore[list-item]
        pytest.param('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', "entities", id="entities"),
        pytest.param("<annotation>" + " " * 2**20 + "</annotation>", "too long", id="too-long"),
    ],
)
def test_a_wrong_annotation_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.xml").write_text(content)
    with pytest.raises(TrainingError, match=message):
        read_voc(tmp_path / "wrong.xml")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda home: (home / "ImageSets/Main/val.txt").unlink(), "no list", id="no-list"),
        pytest.param(
            lambda home: (home / "ImageSets/Main/val.txt").write_text("\n"), "names no", id="empty-list"
        ),
        pytest.param(
            lambda home: (home / "Annotations/val_001.xml").unlink(), "no annotation", id="no-annotation"
        ),
        pytest.param(lambda home: (home / "JPEGImages/val_001.jpg").unlink(), "no picture", id="no-picture"),
        pytest.param(
            lambda home: (home / "JPEGImages/val_001.jpg").write_bytes(b"\xff\xd8\xff"),
            "no picture that can be read",
            id="half-a-picture",
        ),
    ],
)
def test_a_data_folder_with_wrong_files_is_refused_in_a_sentence(
    spoil: object, message: str, tmp_path: Path
) -> None:
    write_slides(tmp_path, {"train": 1, "val": 2})
    spoil(tmp_path / "BCCD")  # type: ignore[operator]
    with pytest.raises(TrainingError, match=message):
        load_bccd(tmp_path, "val", verify=False)


# ---- augmentation ----


def test_distorted_boxes_stay_on_their_cells(truth: list[Annotated]) -> None:
    """Discs alone on a blank slide: wherever they go, their boxes go with them."""
    chance = np.random.default_rng(0)
    blank = np.full((240, 320, 3), 255, np.uint8)
    for x, y in ((60, 60), (160, 120), (250, 190)):
        cv2.circle(blank, (x, y), 30, (0, 0, 0), cv2.FILLED)
    boxes = np.array([[x - 30, y - 30, x + 31, y + 31] for x, y in ((60, 60), (160, 120), (250, 190))])
    example = Annotated("", blank, boxes.astype(np.float32), np.array([0, 1, 2]))
    how = replace(Distortion(), contrast=0, tint=0, brightness=0, soft=0, visible=1)
    kept = 0
    for _ in range(40):
        canvas, found, labels = distort(example, how, chance)
        assert (canvas.shape, canvas.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
        assert len(found) == len(labels)
        for box in found:
            kept += 1
            left, top, right, bottom = np.rint(box).astype(int)
            dark = canvas[top:bottom, left:right, 0] < 128
            assert dark.mean() == pytest.approx(np.pi / 4, abs=0.05)
            assert dark.any(axis=0).mean() > 0.95
            assert dark.any(axis=1).mean() > 0.95
    assert kept > 40


def test_the_calmest_distortion_shows_pictures_as_they_are_served(truth: list[Annotated]) -> None:
    how = replace(Distortion(), contrast=0, tint=0, brightness=0, soft=0).calmer(1)
    served, lies = room.letterbox(truth[0].pixels)
    seen = set()
    for seed in range(20):
        canvas, boxes, _ = distort(truth[0], how, np.random.default_rng(seed))
        ways = {
            "as it is": canvas,
            "across": canvas[:, ::-1],
            "down": canvas[::-1],
            "both": canvas[::-1, ::-1],
        }
        seen |= {name for name, way in ways.items() if np.array_equal(way, served)}
        assert len(boxes) == len(truth[0].boxes)
    assert seen == {"as it is", "across", "down", "both"}
    assert lies.canvas_width == WIDTH


def test_the_same_chance_gives_the_same_picture(truth: list[Annotated]) -> None:
    one, other = (distort(truth[0], Distortion(), np.random.default_rng(5)) for _ in range(2))
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


# ---- network and loss ----


def test_the_network_is_small(truth: list[Annotated]) -> None:
    network, work = ARCHITECTURES["cnn"]().eval(), 0

    def count(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal work
        work += output.numel() * module.weight[0].numel()  # type: ignore[index]

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    with torch.inference_mode():
        logits, boxes = network(torch.zeros(1, HEIGHT, WIDTH, 3, dtype=torch.uint8))
    assert logits.shape == (1, ROWS * COLUMNS, len(LABELS))
    assert boxes.shape == (1, ROWS * COLUMNS, 4)
    assert sum(weight.numel() for weight in network.parameters()) <= 5_000_000
    assert work <= 3e9, "multiplications for one picture"


def batch(*boxes: Sequence[float], label: int = 0) -> Batch:
    """One picture with these cells."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    cells = np.array(boxes, np.float32).reshape(-1, 4)
    return batch_of([(pixels, cells, np.full(len(cells), label))], torch.device("cpu"))


def test_places_inside_a_cell_answer_for_it_as_surely_as_their_box_is_good() -> None:
    places = middles()
    around = torch.cat([places - 20, places + 20], dim=1)[None]
    cells = batch((100, 100, 140, 140), (300, 200, 340, 240), label=2)
    cell, wanted = assign(torch.zeros(1, len(places), len(LABELS)), around, cells)
    for number in (0, 1):
        mine = places[cell[0] == number]
        assert 0 < len(mine) <= detection.PLACES_PER_CELL
        left, top, right, bottom = cells.boxes[0, number].tolist()
        assert ((mine > torch.tensor([left, top])) & (mine < torch.tensor([right, bottom]))).all()
    best = wanted[0].argmax()
    overlap = room.overlaps(around[0, best : best + 1].numpy(), cells.boxes[0].numpy()).max()
    assert wanted.max().item() == pytest.approx(overlap)
    assert (wanted[cell < 0] == 0).all()


def test_a_picture_without_cells_still_teaches() -> None:
    network = ARCHITECTURES["cnn"]()
    torch.autograd.backward(detection.loss(network, batch()))
    gradient = network.kind[-1].bias.grad
    assert gradient is not None
    assert (gradient > 0).all(), "towards less confidence everywhere"


def test_the_box_loss_is_nothing_where_boxes_are_equal_and_grows_with_the_distance() -> None:
    box = torch.tensor([[10.0, 20.0, 60.0, 50.0]])
    losses = [box_loss(box + shift, box).item() for shift in (0, 5, 20, 200)]
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses == sorted(losses)
    assert losses[-1] > 1, "even without any overlap, nearer is better"


def test_the_graph_gives_the_surest_boxes_in_onnx_as_in_torch() -> None:
    torch.manual_seed(0)
    network = ARCHITECTURES["cnn"]().eval()
    with torch.no_grad():
        network.kind[-1].bias.fill_(-3)
        network.kind[-1].weight.mul_(8)
    whole = detection.head(network, {})
    pixels = np.random.default_rng(0).integers(0, 256, (2, HEIGHT, WIDTH, 3), dtype=np.uint8)
    with torch.inference_mode():
        right = [output.numpy() for output in whole(torch.from_numpy(pixels))]
    boxes, confidence, label = right
    assert boxes.shape == (2, CANDIDATES, 4)
    assert (np.diff(confidence) <= 0).all()
    is_real = confidence >= room.LEAST_CONFIDENCE
    assert is_real.any()
    assert (label[is_real] >= 0).all()
    assert (label[~is_real] == -1).all()
    assert (boxes[~is_real] == 0).all()
    session = onnxruntime.InferenceSession(to_onnx(whole, DETECTION), providers=["CPUExecutionProvider"])
    found = session.run([tensor.name for tensor in DETECTION.network_outputs], {"pixels": pixels})
    for output, tensor in zip(found, DETECTION.network_outputs, strict=True):
        assert output.dtype == tensor.dtype
    distances = apart(found, right)
    assert len(distances) > 0
    assert distances.max() < 1e-4


# ---- score ----


def perfect(truth: list[Annotated]) -> list[room.Detections]:
    return [
        room.Detections(320, 240, one.boxes, np.linspace(0.9, 0.5, len(one.labels)), one.labels)  # type: ignore[arg-type]
        for one in truth
    ]


def test_perfect_answers_score_one_and_none_score_nothing(truth: list[Annotated]) -> None:
    scores = average_precision(perfect(truth), truth)
    assert min(scores.values()) == pytest.approx(1.0)
    assert len(scores) == 2 + 2 * len(LABELS)
    nothing = [room.Detections(320, 240, one.boxes[:0], np.zeros(0), one.labels[:0]) for one in truth]  # type: ignore[arg-type]
    assert set(average_precision(nothing, truth).values()) == {0.0}


def test_a_label_that_nobody_marked_does_not_count(truth: list[Annotated]) -> None:
    only_red = [
        one._replace(boxes=one.boxes[one.labels == 0], labels=one.labels[one.labels == 0]) for one in truth
    ]
    scores = average_precision(perfect(only_red), only_red)
    assert scores["map50"] == scores["ap50_rbc"] == pytest.approx(1.0)
    assert scores["ap50_wbc"] == 0


def test_boxes_that_half_fit_score_at_half_an_overlap_only(truth: list[Annotated]) -> None:
    wide = [
        replace(
            one,
            boxes=one.boxes + np.array([0, 0, 0.5, 0], np.float32) * (one.boxes[:, 2:3] - one.boxes[:, :1]),
        )
        for one in perfect(truth)
    ]
    scores = average_precision(wide, truth)
    assert scores["map50"] > 0.95
    assert 0.3 < scores["map50_95"] < 0.5


def test_apart_does_not_mind_the_order_but_what_is_missing_or_elsewhere() -> None:
    boxes = np.array([[[0, 0, 50, 50], [100, 100, 150, 150], [0, 0, 0, 0]]], np.float32)
    confidence, label = np.array([[0.8, 0.7, 0.0]]), np.array([[0, 1, -1]])
    right = [boxes, confidence, label]
    swapped = [array[:, [1, 0, 2]] for array in right]
    assert apart(swapped, right).max() == 0
    moved = [boxes + np.array([0, 0, 5.12, 0], np.float32), confidence, label]
    assert apart(moved, right).max() == pytest.approx(0.01)
    assert apart([boxes, confidence, np.array([[0, 2, -1]])], right).max() == 1
    assert apart([boxes[:, ::2], confidence[:, ::2], label[:, ::2]], right).max() == 1


# ---- runs ----


def start(slides: Path, out: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "training", "detection", "--own-data", *SMALL]
    return subprocess.run(
        [*command, "--out", str(out), *arguments],
        cwd=ROOT,
        env={**os.environ, "QUINTET_DATA": str(slides), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="session")
def run_folder(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs."""
    out = tmp_path_factory.mktemp("detection")
    ran = start(slides, out)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return out


def test_a_run_learns_and_leaves_weights_card_and_pictures(run_folder: Path, slides: Path) -> None:
    network, card = read_checkpoint(run_folder)
    state = torch.load(run_folder / "last.pt", weights_only=True)
    first, second = (row["detection/loss"] for row in state["epochs"])
    assert second < first
    assert card["labels"] == list(LABELS)
    assert card["data"]["name"] == "own pictures"
    assert card["training"]["command"].startswith("python -m training detection --arch cnn --epochs 2")
    exam = detection.exam(slides, card)
    assert len(exam) == 3
    found = detection.answers(network, torch.from_numpy(exam.inputs[0]))
    assert exam.score(found, exam.truth) == pytest.approx(card["scores"])
    assert exam.decide is not None
    assert exam.margin is not None
    assert exam.decide(found).shape == exam.margin(found).shape == (3, len(LABELS))
    (calibration,) = detection.calibration(slides, card)
    assert calibration.shape == (4, HEIGHT, WIDTH, 3)
    for picture in ("cells.png", "learning_curve.png"):
        assert (run_folder / picture).read_bytes().startswith(b"\x89PNG")
    assert not [path for path in run_folder.iterdir() if "tmp" in path.name]


def test_a_run_broken_off_and_resumed_ends_with_the_same_weights(
    run_folder: Path, slides: Path, tmp_path: Path
) -> None:
    """Broken off after the first epoch, as a kill would leave it."""
    code = (
        "import sys; from training import fit, __main__ as command; keep = fit._keep\n"
        "def last(*a):\n    keep(*a); sys.exit(9)\n"
        "fit._keep = last; command.main(sys.argv[1:])"
    )
    arguments = ["detection", "--own-data", *SMALL, "--out", str(tmp_path), "--data", str(slides)]
    # On one thread, as the unbroken run: sums over several are not equal to the last bit.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    broken = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=one_thread, capture_output=True, timeout=300
    )
    assert broken.returncode == 9, broken.stderr
    resumed = start(slides, tmp_path, "--resume")
    assert "Resuming after epoch 1." in resumed.stdout, resumed.stderr
    ours, theirs = read_checkpoint(tmp_path)[0].state_dict(), read_checkpoint(run_folder)[0].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_exam_refuses_other_pictures(run_folder: Path, tmp_path: Path) -> None:
    card = json.loads((run_folder / "card.json").read_text())
    write_slides(tmp_path, {"train": 1, "val": 2})
    with pytest.raises(TrainingError, match="sha256"):
        detection.exam(tmp_path, card)


def test_wrong_data_end_with_one_sentence(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["detection", "--own-data", "--out", str(tmp_path / "out"), "--data"]
    assert main([*arguments, str(tmp_path)]) == 2
    assert "BCCD" in capsys.readouterr().err
    assert main([*arguments, str(slides), "--holdout", "4"]) == 2
    said = capsys.readouterr().err
    assert "leaves nothing of 4 pictures" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
