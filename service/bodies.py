"""People's bodies to a room's inputs: one table, by what the room takes and the body's media type.

The door looks a reader up and calls it; a sixth kind of body is one more entry here.
"""

import secrets
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl

from service.errors import BadInput, UnsupportedMediaType
from service.http import read_json, read_multipart
from service.models.pictures import MEDIA_TYPES
from service.models.spec import Inputs, Room
from service.open_inference import decode_base64

LARGEST_RANDOM_SEED: Final = 2**32
"""Seeds that we choose stay far below what a JSON reader in JavaScript keeps exactly."""

MAX_PARAMETERS: Final = 32
"""No address that anyone means has more parameters than this."""


Parameters = dict[bytes, bytes]


def _picture(content: bytes, parameters: Parameters, max_inputs: int) -> list[Inputs]:
    return [{"image": content}]


def _pictures_in_parts(content: bytes, parameters: Parameters, max_inputs: int) -> list[Inputs]:
    boundary = parameters.get(b"boundary")
    return [{"image": part} for part in read_multipart(content, boundary, b"images", max_inputs)]


def _pictures_in_json(content: bytes, parameters: Parameters, max_inputs: int) -> list[Inputs]:
    texts = _only_list(content, max_inputs, "images", '{"images": ["<base64>", …]}')
    return [{"image": _base64(text, index, len(texts))} for index, text in enumerate(texts)]


def _base64(text: Any, index: int, count: int) -> bytes:
    try:
        if isinstance(text, str):
            return decode_base64(text)
        raise BadInput("A picture in JSON must be base64 text.")
    except BadInput as error:
        error.index = index if count > 1 else None
        raise


def _text(content: bytes, parameters: Parameters, max_inputs: int) -> list[Inputs]:
    charset = parameters.get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8", b"us-ascii"):
        raise UnsupportedMediaType("The text's charset is not served; send UTF-8.")
    return [{"text": content}]


def _texts_in_json(content: bytes, parameters: Parameters, max_inputs: int) -> list[Inputs]:
    texts = _only_list(content, max_inputs, "texts", '{"texts": ["…", …]}')
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise BadInput("A text in JSON must be a text.", index=index if len(texts) > 1 else None)
    return [{"text": text.encode()} for text in texts]


def _digits(content: bytes, parameters: Parameters, max_inputs: int) -> list[Inputs]:
    """The digits asked for, or all ten, with the seed asked for, or any: one seed for all of a request."""
    asked = read_json(content) if content else {}
    digits = asked.get("digits", list(range(10)))
    if not set(asked) <= {"digits", "seed"} or not isinstance(digits, list):
        raise BadInput('The JSON body must be {"digits": [3, …], "seed": 7}; both may be left out.')
    _check_count(digits, max_inputs)
    seed = asked["seed"] if "seed" in asked else secrets.randbelow(LARGEST_RANDOM_SEED)
    return [{"digit": digit, "seed": seed} for digit in digits]


def _only_list(content: bytes, max_inputs: int, name: str, form: str) -> list[Any]:
    """The list that is a JSON body's only field."""
    found = read_json(content)
    if set(found) != {name} or not isinstance(found[name], list):
        raise BadInput(f"The JSON body must be {form}.")
    _check_count(found[name], max_inputs)
    return list(found[name])


def _check_count(values: list[Any], max_inputs: int) -> None:
    # Here already: taking millions of elements apart, only to refuse them, would take seconds.
    if len(values) > max_inputs:
        raise BadInput(f"The request has {len(values)} inputs; send 1 to {max_inputs}.")


Reader = Callable[[bytes, Parameters, int], list[Inputs]]
"""Takes a whole, decompressed body, its media type's parameters, and how many inputs it may have."""

READERS: Final[Mapping[str, Mapping[bytes, Reader]]] = {
    "pictures": {
        **{kind.encode(): _picture for kind in MEDIA_TYPES},
        b"application/octet-stream": _picture,
        b"multipart/form-data": _pictures_in_parts,
        b"application/json": _pictures_in_json,
        b"": _picture,
    },
    "texts": {b"text/plain": _text, b"application/json": _texts_in_json, b"": _text},
    "digits": {b"application/json": _digits, b"": _digits},
}
"""By `Room.takes`, then by media type; the empty one is a body whose type is not said."""


def reader_of(room: Room, media_type: bytes) -> Reader:
    """What reads a body of this type for this room.

    Raises:
        UnsupportedMediaType: nothing does.
    """
    readers = READERS[room.takes]
    reader = readers.get(media_type)
    if reader is None:
        served = ", ".join(kind.decode() for kind in readers if kind)
        raise UnsupportedMediaType(f"The media type is not served; send {served}.")
    return reader


def read_query(room: Room, query: bytes) -> dict[str, float]:
    """The room's options as an address names them; those not named have their defaults.

    Raises:
        BadInput: an option the room does not have, one named twice, or a value outside its range.
    """
    values = {name: option.default for name, option in room.options.items()}
    if not query:
        return values
    known = ", ".join(room.options) or "none"
    try:
        named = parse_qsl(query.decode(), keep_blank_values=True, max_num_fields=MAX_PARAMETERS)
    except ValueError:
        raise BadInput("The address's parameters cannot be read; write them as name=value.") from None
    if len(dict(named)) != len(named):
        raise BadInput("A parameter of the address is named twice.")
    for name, text in named:
        option = room.options.get(name)
        if option is None:
            raise BadInput(f"The address has a parameter that {room} does not take; it takes {known}.")
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        values[name] = option.check(name, value)
    return values


def prefers_picture(accept: bytes) -> bool:
    """Whether an Accept header would rather have `image/png` than JSON (RFC 9110, section 12.5.1).

    Of equals the first named; who names neither gets JSON.
    """
    best, is_picture = 0.0, False
    for one in accept.lower().split(b","):
        kind, *parameters = (word.strip() for word in one.split(b";"))
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith(b"q="):
                try:
                    weight = float(parameter[2:])
                except ValueError:
                    weight = 0.0
        if weight > best:
            best, is_picture = weight, kind in (b"image/png", b"image/*")
    return is_picture
