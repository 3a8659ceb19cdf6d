"""What people may send to each kind of room, and what becomes of it: read without a server."""

import base64
import json
from dataclasses import replace
from typing import Any

import pytest

from service.bodies import READERS, prefers_picture, read_query, reader_of
from service.errors import BadInput, UnsupportedMediaType
from service.models.digit import DIGIT
from service.models.spec import Option, Room

PICTURES = DIGIT
TEXTS = replace(DIGIT, name="letters", takes="texts")
DIGITS = replace(DIGIT, name="numbers", takes="digits")
CHOOSY = replace(DIGIT, options={"min_confidence": Option(0.5, 0.0, 1.0, "The least confidence given.")})

JSON = b"application/json"


def read(room: Room, kind: bytes, content: Any, **parameters: bytes) -> list[dict[str, Any]]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    named = {name.encode(): value for name, value in parameters.items()}
    return [dict(one) for one in reader_of(room, kind)(body, named, 10)]


def parts(*contents: bytes) -> bytes:
    head = b'--line\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n'
    return b"".join(head + content + b"\r\n" for content in contents) + b"--line--\r\n"


def test_every_kind_of_room_has_its_readers() -> None:
    assert set(READERS) == {"pictures", "texts", "digits"}


@pytest.mark.parametrize("kind", [b"", b"image/png", b"image/webp", b"application/octet-stream"])
def test_a_raw_picture_is_one_input(kind: bytes) -> None:
    assert read(PICTURES, kind, b"\x89PNG") == [{"image": b"\x89PNG"}]


def test_pictures_in_parts_and_in_json_keep_their_order() -> None:
    expected = [{"image": b"one"}, {"image": b"two"}]
    assert read(PICTURES, b"multipart/form-data", parts(b"one", b"two"), boundary=b"line") == expected
    texts = [base64.b64encode(one).decode() for one in (b"one", b"two")]
    assert read(PICTURES, JSON, {"images": texts}) == expected


@pytest.mark.parametrize("charset", [b"utf-8", b"UTF-8", b"us-ascii"])
def test_a_plain_text_is_one_input(charset: bytes) -> None:
    assert read(TEXTS, b"text/plain", "schön".encode(), charset=charset) == [{"text": "schön".encode()}]


def test_texts_in_json_keep_their_order() -> None:
    assert read(TEXTS, JSON, {"texts": ["schön", ""]}) == [{"text": "schön".encode()}, {"text": b""}]


def test_a_text_in_another_charset_is_refused() -> None:
    with pytest.raises(UnsupportedMediaType, match="UTF-8"):
        read(TEXTS, b"text/plain", b"sch\xf6n", charset=b"latin-1")


def test_digits_share_one_seed() -> None:
    asked = read(DIGITS, JSON, {"digits": [3, 1, 3], "seed": 7})
    assert asked == [{"digit": 3, "seed": 7}, {"digit": 1, "seed": 7}, {"digit": 3, "seed": 7}]


@pytest.mark.parametrize("content", [b"", b"{}", b'{"seed": 7}'], ids=["no body", "no field", "a seed"])
def test_without_digits_come_all_ten(content: bytes) -> None:
    kind = JSON if content else b""
    asked = reader_of(DIGITS, kind)(content, {}, 10)
    assert [one["digit"] for one in asked] == list(range(10))
    assert len({one["seed"] for one in asked}) == 1


def test_without_a_seed_comes_another_each_time() -> None:
    assert len({read(DIGITS, JSON, {"digits": [3]})[0]["seed"] for _ in range(10)}) > 1


@pytest.mark.parametrize(
    ("room", "content", "says"),
    [
        pytest.param(TEXTS, {"texts": "one"}, "texts", id="a text that is no list"),
        pytest.param(TEXTS, {"texts": ["one"], "more": 1}, "texts", id="a field too many"),
        pytest.param(TEXTS, {"text": ["one"]}, "texts", id="a field of another name"),
        pytest.param(TEXTS, {"texts": [7]}, "text", id="a number for a text"),
        pytest.param(TEXTS, {"texts": ["a"] * 11}, "11 inputs", id="too many texts"),
        pytest.param(TEXTS, b'{"texts": ["\\ud800"]}', "JSON", id="half a character"),
        pytest.param(DIGITS, {"digits": 3}, "digits", id="a digit that is no list"),
        pytest.param(DIGITS, {"digits": [3], "seeds": [7]}, "digits", id="a field nobody knows"),
        pytest.param(DIGITS, {"digits": [3] * 11}, "11 inputs", id="too many digits"),
        pytest.param(DIGITS, [3], "object", id="a list for the body"),
        pytest.param(PICTURES, {"images": ["!"]}, "base64", id="a text that is not base64"),
        pytest.param(PICTURES, {"images": [7]}, "base64", id="a number for a picture"),
    ],
)
def test_a_body_of_another_form_is_refused_with_the_right_one(room: Room, content: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        read(room, JSON, content)


def test_the_text_at_fault_is_named() -> None:
    with pytest.raises(BadInput) as caught:
        read(TEXTS, JSON, {"texts": ["one", 7]})
    assert caught.value.index == 1


@pytest.mark.parametrize(
    ("room", "kind"),
    [(TEXTS, b"image/png"), (DIGITS, b"text/plain"), (PICTURES, b"text/plain"), (DIGITS, b"text/html")],
)
def test_another_media_type_is_refused_and_the_right_ones_are_named(room: Room, kind: bytes) -> None:
    with pytest.raises(UnsupportedMediaType, match="application/json"):
        read(room, kind, b"")


def test_an_option_has_its_default_until_it_is_named() -> None:
    assert read_query(CHOOSY, b"") == {"min_confidence": 0.5}
    assert read_query(CHOOSY, b"min_confidence=0.25") == {"min_confidence": 0.25}
    assert read_query(DIGIT, b"") == {}


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (b"min_confidence=1.5", "from 0 to 1"),
        (b"min_confidence=nan", "from 0 to 1"),
        (b"min_confidence=much", "from 0 to 1"),
        (b"min_confidence=", "from 0 to 1"),
        (b"min_confidence=0.1&min_confidence=0.2", "twice"),
        (b"confidence=0.5", "min_confidence"),
        (b"%ff=1", "min_confidence"),
        (b"\xff", "cannot be read"),
        (b"&".join([b"a=1"] * 100), "cannot be read"),
    ],
)
def test_an_option_that_cannot_be_is_refused(query: bytes, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        read_query(CHOOSY, query)


@pytest.mark.parametrize(
    ("accept", "is_picture"),
    [
        (b"", False),
        (b"*/*", False),
        (b"application/json", False),
        (b"image/png", True),
        (b"IMAGE/PNG", True),
        (b"image/*", True),
        (b"image/png, application/json", True),
        (b"application/json, image/png", False),
        (b"image/png;q=0.5, application/json", False),
        (b"application/json;q=0.5, image/png;q=0.9", True),
        (b"image/png;q=0", False),
        (b"image/png;q=much, */*", False),
        (b"text/html,application/xhtml+xml,image/avif,image/webp,*/*;q=0.8", False),
    ],
)
def test_a_picture_comes_to_those_who_would_rather_have_one(accept: bytes, is_picture: bool) -> None:
    assert prefers_picture(accept) is is_picture
