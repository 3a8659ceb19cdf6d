"""Archives found, downloaded, resumed, verified and unpacked; the mirrors are real HTTP servers."""

import hashlib
import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from training import data
from training.data import Archive, content_digest, find_archive
from training.errors import TrainingError

from .conftest import ROOT
from .mirror import Mirror, serving

NOISE = b"".join(hashlib.sha256(bytes([number % 256, number // 256])).digest() for number in range(6000))
FILES = {
    "reviews/train/pos/1_9.txt": b"fine",
    "reviews/train/pos/2_8.txt": b"good <br /> still good",
    "reviews/train/neg/1_1.txt": NOISE,
}
OTHERS = {"reviews/README": b"read me", "reviews/test/pos/1_9.txt": b"not for us"}


def zipped(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def tarred(files: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, target in (links or {}).items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def lay(files: Mapping[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def md5(content: bytes) -> str:
    return "md5:" + hashlib.md5(content, usedforsecurity=False).hexdigest()


def nowhere() -> Archive:
    """The reviews, with no mirror yet."""
    return Archive(
        name="Reviews",
        folder="reviews",
        mirrors=("http://127.0.0.1:9/reviews.zip",),
        files=("train/pos/*.txt", "train/neg/*.txt"),
        file_count=3,
        content_bytes=sum(map(len, FILES.values())),
        content_sha256="",
    )


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    folder = lay(FILES, tmp_path_factory.mktemp("right"))
    count, total, digest = content_digest(nowhere(), folder / "reviews")
    assert (count, total) == (3, nowhere().content_bytes)
    return replace(nowhere(), content_sha256=digest)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setattr(data, "WAIT_SECONDS", 0.01)
    with serving() as server:
        server.files = {
            "reviews.zip": zipped(FILES | OTHERS),
            "reviews.tar.gz": tarred(FILES | OTHERS),
            "altered.zip": zipped({**FILES, "reviews/train/pos/1_9.txt": b"fume"}),
            "cut.zip": zipped(FILES)[:-100],
            "cut.tar.gz": tarred(FILES)[:-100],
        }
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("kind", ["reviews.zip", "reviews.tar.gz"])
def test_a_missing_archive_is_downloaded_and_what_we_read_of_it_unpacked(
    reviews: Archive, mirror: Mirror, tmp_path: Path, kind: str
) -> None:
    archive = replace(reviews, mirrors=(mirror.address + kind,), checksum=md5(mirror.files[kind]))
    assert find_archive(archive, tmp_path / "data") == tmp_path / "data" / "reviews"
    assert contents(tmp_path / "data") == FILES, "no more and no scraps"
    assert find_archive(archive, tmp_path / "data") == tmp_path / "data" / "reviews"
    assert len(mirror.asked) == 1, "found, so not downloaded again"


def test_a_mirror_may_hold_the_files_themselves(mirror: Mirror, tmp_path: Path) -> None:
    mirror.files |= {"model/config.json": b"{}", "model/onnx/weights": NOISE}
    archive = Archive(
        "Model", "model", (mirror.address + "model/",), ("config.json", "onnx/weights"), 2, 2 + len(NOISE), ""
    )
    lay({"model/config.json": b"{}", "model/onnx/weights": NOISE}, tmp_path / "right")
    archive = replace(archive, content_sha256=content_digest(archive, tmp_path / "right" / "model")[2])
    mirror.breaks_after = [2, 1000]
    find_archive(archive, tmp_path / "data")
    assert contents(tmp_path / "data") == {"model/config.json": b"{}", "model/onnx/weights": NOISE}


def test_a_folder_in_the_archive_may_have_another_name(
    reviews: Archive, mirror: Mirror, tmp_path: Path
) -> None:
    mirror.files["commit.zip"] = zipped({f"set-abc/{name}": content for name, content in FILES.items()})
    archive = replace(reviews, mirrors=(mirror.address + "commit.zip",), inside="set-abc/reviews")
    find_archive(archive, tmp_path)
    assert contents(tmp_path) == FILES


def test_a_download_that_breaks_off_goes_on_where_it_stopped(
    reviews: Archive, mirror: Mirror, tmp_path: Path
) -> None:
    mirror.breaks_after = [6 * 2**14, 2**14, 1]
    find_archive(replace(reviews, mirrors=(mirror.address + "reviews.zip",)), tmp_path)
    assert [wanted for _, wanted in mirror.asked] == [
        None,
        f"bytes={6 * 2**14}-",
        f"bytes={7 * 2**14}-",
        f"bytes={7 * 2**14}-",
    ]


def test_a_server_that_knows_no_ranges_sends_all_again(
    reviews: Archive, mirror: Mirror, tmp_path: Path
) -> None:
    mirror.knows_ranges, mirror.breaks_after = False, [100_000]
    find_archive(replace(reviews, mirrors=(mirror.address + "reviews.zip",)), tmp_path)
    assert contents(tmp_path) == FILES
    assert len(mirror.asked) == 2


def test_a_server_in_trouble_is_asked_again(reviews: Archive, mirror: Mirror, tmp_path: Path) -> None:
    mirror.refuses = 2
    find_archive(replace(reviews, mirrors=(mirror.address + "reviews.zip",)), tmp_path)
    assert len(mirror.asked) == 3


def test_a_server_that_always_breaks_off_is_left_and_its_part_kept(
    reviews: Archive, mirror: Mirror, tmp_path: Path
) -> None:
    archive = replace(reviews, mirrors=(mirror.address + "reviews.zip",))
    mirror.breaks_after = [2**16, *[0] * 10]
    with pytest.raises(TrainingError, match="no mirror gave it"):
        find_archive(archive, tmp_path)
    assert not (tmp_path / "reviews").exists()
    mirror.breaks_after, mirror.asked = [], []
    find_archive(archive, tmp_path)
    assert mirror.asked == [("reviews.zip", "bytes=65536-")]
    assert contents(tmp_path) == FILES


def test_a_part_of_a_file_that_is_shorter_now_is_thrown_away(
    reviews: Archive, mirror: Mirror, tmp_path: Path
) -> None:
    archive = replace(reviews, mirrors=(mirror.address + "reviews.zip",))
    right = mirror.files["reviews.zip"]
    mirror.files["reviews.zip"] = right + bytes(80_000)
    mirror.breaks_after = [len(right) + 70_000, *[0] * 10]
    with pytest.raises(TrainingError):
        find_archive(archive, tmp_path)
    mirror.files["reviews.zip"], mirror.breaks_after = right, []
    find_archive(archive, tmp_path)
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        pytest.param("missing.zip", "it answers 404 Not Found", id="missing"),
        pytest.param("altered.zip", "its checksum differs", id="altered"),
        pytest.param("cut.zip", "it is damaged or cut short", id="zip-cut-short"),
        pytest.param("cut.tar.gz", "it is damaged or cut short", id="tar-cut-short"),
    ],
)
def test_a_wrong_archive_is_passed_over(
    reviews: Archive,
    mirror: Mirror,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wrong: str,
    says: str,
) -> None:
    archive = replace(reviews, mirrors=(mirror.address + wrong, mirror.address + "reviews.tar.gz"))
    find_archive(archive, tmp_path)
    assert contents(tmp_path) == FILES
    assert says in " ".join(capsys.readouterr().out.split())


def test_an_archive_that_is_not_the_publishers_is_not_even_unpacked(
    reviews: Archive, mirror: Mirror, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = replace(
        reviews, mirrors=(mirror.address + "altered.zip",), checksum=md5(mirror.files["reviews.zip"])
    )
    with pytest.raises(
        TrainingError,
        match=r"fetch .*altered\.zip elsewhere, unpack it there so that there is .*reviews/train/pos/…\.txt",
    ):
        find_archive(archive, tmp_path)
    assert contents(tmp_path) == {}
    assert "hash" in capsys.readouterr().out


@pytest.mark.parametrize(
    "packed",
    [
        pytest.param(zipped({"reviews/train/pos/../../../../evil.txt": b"", **FILES}), id="zip-dots"),
        pytest.param(zipped({"/evil.txt": b"", **FILES}), id="zip-root"),
        pytest.param(tarred({"reviews/train/pos/../../../../evil.txt": b"", **FILES}), id="tar-dots"),
        pytest.param(tarred({"/evil.txt": b"", **FILES}), id="tar-root"),
        pytest.param(tarred(FILES, {"reviews/train/pos/evil.txt": "/etc/hostname"}), id="tar-link"),
    ],
)
def test_names_that_lead_elsewhere_are_left_in_the_archive(
    reviews: Archive, mirror: Mirror, tmp_path: Path, packed: bytes
) -> None:
    name = "evil.zip" if packed.startswith(b"PK") else "evil.tar.gz"
    mirror.files[name] = packed
    find_archive(replace(reviews, mirrors=(mirror.address + name,)), tmp_path / "a" / "b")
    assert contents(tmp_path / "a" / "b") == FILES
    assert not list(tmp_path.rglob("evil*"))


def test_a_folder_that_is_a_link_leads_nowhere(reviews: Archive, mirror: Mirror, tmp_path: Path) -> None:
    """The link itself is not unpacked, so what goes through it stays inside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    mirror.files["evil.tar.gz"] = tarred(FILES, {"reviews/train": str(outside)})
    find_archive(replace(reviews, mirrors=(mirror.address + "evil.tar.gz",)), tmp_path / "data")
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("kind", ["reviews.zip", "reviews.tar.gz"])
def test_an_archive_that_unpacks_to_too_much_is_refused(
    reviews: Archive,
    mirror: Mirror,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    bomb = {**FILES, "reviews/train/pos/3_7.txt": bytes(2**20)}
    mirror.files = {"reviews.zip": zipped(bomb), "reviews.tar.gz": tarred(bomb)}
    monkeypatch.setattr(data, "LARGEST_ARCHIVE_BYTES", 2**19)
    with pytest.raises(TrainingError, match="no mirror gave it"):
        find_archive(replace(reviews, mirrors=(mirror.address + kind,)), tmp_path)
    assert "unpacks to more than 524,288 bytes" in " ".join(capsys.readouterr().out.split())
    assert contents(tmp_path) == {}


def test_a_download_that_never_ends_is_ended(
    reviews: Archive, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "LARGEST_ARCHIVE_BYTES", 2**16)
    with pytest.raises(TrainingError, match="no mirror gave it"):
        find_archive(replace(reviews, mirrors=(mirror.address + "reviews.zip",)), tmp_path)
    assert contents(tmp_path) == {}


PROGRAM = """
import sys
from pathlib import Path
from training.data import Archive, find_archive
from training.errors import TrainingError
_, address, checksum, count, total, digest, folder = sys.argv
archive = Archive("Reviews", "reviews", (address,), ("train/pos/*.txt", "train/neg/*.txt"),
                  int(count), int(total), digest, checksum)
try:
    find_archive(archive, Path(folder))
except TrainingError as error:
    sys.exit(f"sentence: {error}")
"""


def in_another_process(
    archive: Archive, folder: Path, before: Callable[[], None] | None = None
) -> subprocess.Popen[str]:
    facts = [archive.mirrors[0], archive.checksum or "", archive.file_count, archive.content_bytes]
    command = [sys.executable, "-c", PROGRAM, *map(str, facts), archive.content_sha256, str(folder)]
    return subprocess.Popen(
        command, cwd=ROOT, preexec_fn=before, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_download_goes_on_after_its_process_was_killed(
    reviews: Archive, mirror: Mirror, tmp_path: Path
) -> None:
    packed = mirror.files["reviews.zip"]
    archive = replace(reviews, mirrors=(mirror.address + "reviews.zip",), checksum=md5(packed))
    mirror.pause = threading.Event()
    process = in_another_process(archive, tmp_path)
    until(lambda: sum(path.stat().st_size for path in tmp_path.rglob("*.part")) >= 2**16)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    mirror.pause.set()
    (part,) = tmp_path.rglob("*.part")
    so_far = part.stat().st_size
    assert packed.startswith(part.read_bytes())
    mirror.asked, mirror.pause = [], None
    find_archive(archive, tmp_path)
    assert mirror.asked == [("reviews.zip", f"bytes={so_far}-")]
    assert contents(tmp_path) == FILES


def test_of_two_processes_that_want_it_one_downloads(
    reviews: Archive, mirror: Mirror, tmp_path: Path
) -> None:
    archive = replace(
        reviews, mirrors=(mirror.address + "reviews.zip",), checksum=md5(mirror.files["reviews.zip"])
    )
    both = [in_another_process(archive, tmp_path) for _ in range(2)]
    for process in both:
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 0, printed
    assert len(mirror.asked) == 1
    assert contents(tmp_path) == FILES


def test_where_the_disk_takes_no_more_a_sentence_says_so(
    reviews: Archive, mirror: Mirror, tmp_path: Path
) -> None:
    archive = replace(
        reviews, mirrors=(mirror.address + "reviews.zip",), checksum=md5(mirror.files["reviews.zip"])
    )
    limit = no_file_larger_than(50_000)
    printed, _ = in_another_process(archive, tmp_path, limit).communicate(timeout=60)
    assert f"sentence: Nothing can be written to {tmp_path}: File too large." in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "reviews").exists()


def no_file_larger_than(size: int) -> Callable[[], None]:
    """No file may grow past `size` bytes: what a full disk does, without filling one."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        pytest.param(
            {"reviews/train/neg/1_1.txt": NOISE}, r"train/pos/\*\.txt missing", id="half-of-it-missing"
        ),
        pytest.param(
            {**FILES, "reviews/train/pos/3_9.txt": b"!"}, "4 files of 192,027 bytes", id="one-too-many"
        ),
        pytest.param(
            {**FILES, "reviews/train/neg/1_1.txt": NOISE[:-1]}, "3 files of 192,025", id="cut-short"
        ),
        pytest.param({**FILES, "reviews/train/pos/1_9.txt": b"fume"}, "its checksum differs", id="altered"),
        pytest.param(
            {name.replace("2_8", "2_7"): content for name, content in FILES.items()},
            "its checksum differs",
            id="renamed",
        ),
        pytest.param({"reviews": b"a file"}, "missing", id="a-file-for-a-folder"),
    ],
)
def test_a_folder_with_the_wrong_files_is_refused_and_left_as_it_is(
    reviews: Archive, tmp_path: Path, files: dict[str, bytes], says: str
) -> None:
    lay(files, tmp_path)
    with pytest.raises(
        TrainingError, match=rf"is not the published Reviews \(.*{says}.*move it away and run"
    ):
        find_archive(reviews, tmp_path)
    assert contents(tmp_path) == files


def test_files_that_we_do_not_read_may_lie_beside(reviews: Archive, tmp_path: Path) -> None:
    lay(FILES | OTHERS, tmp_path)
    assert find_archive(reviews, tmp_path) == tmp_path / "reviews"


def test_peoples_own_data_are_taken_as_they_are_and_never_downloaded(
    reviews: Archive, mirror: Mirror, tmp_path: Path
) -> None:
    archive = replace(reviews, mirrors=(mirror.address + "reviews.zip",))
    with pytest.raises(TrainingError, match="put your own data there in the layout of Reviews"):
        find_archive(archive, tmp_path, verify=False)
    assert mirror.asked == []
    lay({"reviews/train/pos/1_9.txt": b"mine"}, tmp_path)
    assert find_archive(archive, tmp_path, verify=False) == tmp_path / "reviews"


def test_only_chosen_files_count_and_only_in_their_canonical_form(tmp_path: Path) -> None:
    lay({"set/list.txt": b"a \r\n", "set/a.txt": b"one", "set/b.txt": b"two"}, tmp_path)
    archive = Archive(
        "Set",
        "set",
        ("http://127.0.0.1:9/set.zip",),
        ("*.txt",),
        2,
        5,
        "",
        chosen=lambda place: [
            "list.txt",
            *(f"{name}.txt" for name in (place / "list.txt").read_text().split()),
        ],
        canonical=lambda content: content.replace(b" \r", b""),
    )
    count, total, digest = content_digest(archive, tmp_path / "set")
    assert (count, total) == (2, 5)
    archive = replace(archive, content_sha256=digest)
    lay({"set/list.txt": b"a\n", "set/b.txt": b"another"}, tmp_path)
    find_archive(archive, tmp_path)
    lay({"set/list.txt": b"c\n"}, tmp_path)
    with pytest.raises(TrainingError, match="a file cannot be read"):
        find_archive(archive, tmp_path)
