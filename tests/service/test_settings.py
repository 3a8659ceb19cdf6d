"""Settings: from the environment, and from a file where the environment says nothing."""

from pathlib import Path

import pytest

from service.settings import SETTINGS_FILE, read_settings


def test_a_file_of_settings_is_read_and_the_environment_goes_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "quintet.env"
    file.write_text("# found somehow\nQUINTET_LANES=3\nQUINTET_QUEUE_SIZE=7\n")
    monkeypatch.setenv(SETTINGS_FILE, str(file))
    monkeypatch.setenv("QUINTET_LANES", "2")
    settings = read_settings()
    assert (settings.lanes, settings.queue_size) == (2, 7)


def test_policies_are_read_from_the_file_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "quintet.env"
    file.write_text("""QUINTET_POLICIES='{"digit": {"max_batch": 8}}'\n""")
    monkeypatch.setenv(SETTINGS_FILE, str(file))
    assert read_settings().policy("digit").max_batch == 8


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param("QUINTET_LINES=3\n", "QUINTET_LINES: there is no such setting", id="unknown"),
        pytest.param("QUINTET_LANES=0\n", "QUINTET_LANES", id="out-of-range"),
        pytest.param(None, "names a file that is not there", id="no-file"),
    ],
)
def test_a_file_that_cannot_be_is_refused_in_a_sentence(
    content: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "quintet.env"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv(SETTINGS_FILE, str(file))
    with pytest.raises(SystemExit, match=words):
        read_settings()
