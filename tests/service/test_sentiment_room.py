"""Any text becomes word pieces, or one sentence that says why it cannot."""

import subprocess
import sys

import numpy as np
import pytest

from service.errors import BadInput
from service.models.sentiment import (
    MAX_TOKENS,
    PADDING,
    SENTIMENT,
    TOKENIZER,
    as_prose,
    read_tokenizer,
    shorten,
    to_tokens,
)
from service.models.spec import Room, Sample

from ..texts import tokenizer_file

TOKENIZER_FILE = tokenizer_file()


@pytest.fixture(scope="module")
def room() -> Room:
    return SENTIMENT.furnish({TOKENIZER: TOKENIZER_FILE})


def pieces(room: Room, text: str) -> list[str]:
    """The word pieces that the network gets."""
    tokenizer = read_tokenizer(TOKENIZER_FILE)
    (tokens,) = room.to_tensor({"text": text.encode()}).tensors
    return [tokenizer.id_to_token(int(token)) for token in tokens]


def test_a_text_is_cut_between_the_tokens_for_beginning_and_end(room: Room) -> None:
    assert pieces(room, "The film was GOOD!") == ["[CLS]", "the", "film", "was", "good", "!", "[SEP]"]
    (tokens,) = room.to_tensor(room.example).tensors
    assert tokens.dtype == np.int64
    assert tokens.ndim == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("it does n't", "it doesn't", id="the-treebank's-not"),
        pytest.param("`` quoted ''", '"quoted"', id="the-treebank's-quotes"),
        pytest.param("-lrb- good -rrb-", "(good)", id="the-treebank's-brackets"),
        pytest.param("good<br /><br />film<BR>", "good film", id="html-line-breaks"),
        pytest.param("  GOOD\n\n\tFilm ", "good film", id="case-and-spaces"),
        pytest.param("good\0 fi\0lm", "good film", id="nul-bytes"),
    ],
)
def test_the_same_words_are_read_alike(one: str, other: str, room: Room) -> None:
    assert pieces(room, one) == pieces(room, other)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("\N{GRINNING FACE}", id="emoji"),
        pytest.param("\N{GRINNING FACE}" * 3_000, id="many-emoji"),
        pytest.param("映画はとても良かった。", id="japanese"),
        pytest.param("\u202e\u200fevil\u0301" * 50, id="marks-and-directions"),
        pytest.param("x" * 1_000_000, id="a-word-of-a-million-letters"),
        pytest.param("!" * 100_000, id="punctuation-only"),
        pytest.param("good " * 10_000, id="ten-thousand-words"),
        pytest.param(" " * 100_000 + "good", id="mostly-blank"),
        pytest.param("<br />" * 20_000 + "good", id="mostly-html"),
        pytest.param("[CLS] [SEP] [MASK] [PAD]", id="names-of-special-tokens"),
    ],
)
def test_any_text_gives_a_bounded_tensor_without_padding(text: str, room: Room) -> None:
    (tokens,) = room.to_tensor({"text": text.encode()}).tensors
    assert 3 <= len(tokens) <= MAX_TOKENS
    assert PADDING not in tokens
    assert (tokens[0], tokens[-1]) == (2, 3)


def test_a_text_that_names_special_tokens_is_not_taken_at_its_word(room: Room) -> None:
    assert pieces(room, "[PAD]") == ["[CLS]", "[", "pad", "]", "[SEP]"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b" \t\r\n", id="blanks"),
        pytest.param(b"\0\0", id="nul-bytes"),
        pytest.param("\u200b\ufeff".encode(), id="invisible"),
        pytest.param(b"<br /><br>", id="line-breaks"),
    ],
)
def test_a_text_with_nothing_to_read_is_refused(text: bytes, room: Room) -> None:
    with pytest.raises(BadInput, match=r"The text is empty; send at least one word\."):
        room.to_tensor({"text": text})


@pytest.mark.parametrize("text", [b"caf\xe9", b"\xff\xfeg\0o\0", b"good \xed\xa0\x80", b"\xf0\x9f\x98"])
def test_a_text_that_is_not_utf_8_is_refused_with_the_place(text: bytes, room: Room) -> None:
    with pytest.raises(BadInput, match=r"not UTF-8 at byte \d+; send it encoded as UTF-8\."):
        room.to_tensor({"text": text})


def test_of_a_long_text_the_beginning_and_the_end_are_kept() -> None:
    tokens = np.arange(1_000)
    kept = shorten(tokens, MAX_TOKENS)
    assert kept.tolist() == [*range(128), *range(1_000 - 384, 1_000)]
    assert shorten(tokens, 1_000) is tokens
    assert shorten(tokens, 1_001) is tokens


def test_what_cannot_be_kept_is_not_even_cut_into_pieces() -> None:
    tokenizer = read_tokenizer(TOKENIZER_FILE)
    middle = "good " * 20_000
    text = "the film " * 500 + middle + "was bad " * 500
    assert np.array_equal(to_tokens(tokenizer, text), to_tokens(tokenizer, text.replace("good", "dull")))


def test_prose_stays_as_it_is() -> None:
    text = "It isn't a < b; \"quoted\", (so) n't."
    assert as_prose(text) == text.replace(" n't", "n't")


def test_an_answer_names_the_likelier_label() -> None:
    answer = SENTIMENT.to_answer((np.array([0.25, 0.75], np.float32),), Sample(()))
    assert answer.as_json() == {
        "label": "positive",
        "confidence": 0.75,
        "probabilities": {"negative": 0.25, "positive": 0.75},
    }
    assert answer.as_tensor("label") == b"positive"


def test_only_short_texts_are_prepared_on_the_event_loop() -> None:
    assert SENTIMENT.is_quick({"text": b"good"})
    assert not SENTIMENT.is_quick({"text": b"good " * 1_000})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"{}", "is not a tokenizer", id="empty-json"),
        pytest.param(b"\xff", "is not a tokenizer", id="not-utf-8"),
        pytest.param(
            TOKENIZER_FILE.replace(b"[PAD]", b"[FIL]"), r"does not call token 0 \[PAD\]", id="other-padding"
        ),
    ],
)
def test_a_tokenizer_that_is_none_of_ours_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SENTIMENT.furnish({TOKENIZER: content})


def test_the_room_alone_prepares_nothing() -> None:
    with pytest.raises(RuntimeError, match=TOKENIZER):
        SENTIMENT.to_tensor(SENTIMENT.example)


def test_the_room_needs_numpy_and_the_tokenizer_only() -> None:
    code = "import sys, service.models.sentiment\nprint({'torch', 'transformers', 'cv2'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    # service.models imports every room, and the others bring OpenCV.
    assert run.stdout.strip() in ("set()", "{'cv2'}")
