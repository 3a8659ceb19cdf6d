"""Wrong requests in every form that we could think of, and the service is well afterwards.

The digit model stands for all: what is the same for each is in `test_error_table.py`.
"""

import base64
import gzip
import json
import re
import socket
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest

from service.proto import grpc_service_pb2 as pb
from tests.conftest import QuintetServer

from .knocking import (
    INFER,
    TOLERANCE,
    GrpcClient,
    ask_alone,
    binary,
    encoded,
    floats_in,
    infer_request,
    picture_request,
    png_claiming,
    tensor,
    with_binary,
)
from .refusals import check_grpc_error, check_problem, check_v2_error

MEBIBYTE = 1024 * 1024


@pytest.fixture(autouse=True)
def the_next_good_request_works(
    http: httpx.Client, grpc_client: GrpcClient, digit_png: bytes
) -> Iterator[None]:
    expected = ask_alone(http, digit_png)
    yield
    assert ask_alone(http, digit_png) == pytest.approx(expected, abs=TOLERANCE)
    answer = grpc_client.call("ModelInfer", picture_request(digit_png))
    assert floats_in(answer)[0].tolist() == pytest.approx(expected, abs=TOLERANCE)


# ---- pictures, through every way in ----


@dataclass(frozen=True)
class Doors:
    """Every way to send pictures; each way checks the refusal it gets and gives its sentence."""

    http: httpx.Client
    grpc: GrpcClient

    def as_the_body(self, pictures: Sequence[bytes], index: int | None) -> str:
        (picture,) = pictures
        return check_problem(self.http.post("/digit", content=picture), 400)

    def as_multipart(self, pictures: Sequence[bytes], index: int | None) -> str:
        files = [("images", ("digit.png", picture)) for picture in pictures]
        return check_problem(self.http.post("/digit", files=files), 400, index)

    def as_base64(self, pictures: Sequence[bytes], index: int | None) -> str:
        texts = [base64.b64encode(picture).decode() for picture in pictures]
        return check_problem(self.http.post("/digit", json={"images": texts}), 400, index)

    def as_json_tensor(self, pictures: Sequence[bytes], index: int | None) -> str:
        texts = [base64.b64encode(picture).decode() for picture in pictures]
        body = {"inputs": [tensor("image", "BYTES", [len(texts)], data=texts)]}
        return check_v2_error(self.http.post(INFER, json=body), 400)

    def as_binary_tensor(self, pictures: Sequence[bytes], index: int | None) -> str:
        raw = binary(*pictures)
        parameters = {"binary_data_size": len(raw)}
        head = {"inputs": [tensor("image", "BYTES", [len(pictures)], parameters=parameters)]}
        return check_v2_error(self.http.post(INFER, **with_binary(head, raw)), 400)

    def over_grpc(self, pictures: Sequence[bytes], index: int | None) -> str:
        error = self.grpc.refusal("ModelInfer", picture_request(*pictures))
        return check_grpc_error(error, 400, index)


@pytest.fixture
def doors(http: httpx.Client, grpc_client: GrpcClient) -> Doors:
    return Doors(http, grpc_client)


WAYS_FOR_SEVERAL = [
    Doors.as_multipart,
    Doors.as_base64,
    Doors.as_json_tensor,
    Doors.as_binary_tensor,
    Doors.over_grpc,
]
WAYS = [Doors.as_the_body, *WAYS_FOR_SEVERAL]
Way = Callable[[Doors, Sequence[bytes], int | None], str]


def cut_short(kind: str) -> Callable[[bytes], bytes]:
    def cut(png: bytes) -> bytes:
        whole = encoded(png, kind)
        return whole[: len(whole) * 2 // 3]

    return cut


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        pytest.param(lambda png: b"", "empty", id="no bytes at all"),
        pytest.param(lambda png: b"A seven, I promise.", "not a picture", id="a text"),
        pytest.param(lambda png: b"%PDF-1.7\n" + png, "not a picture", id="another kind of file"),
        pytest.param(lambda png: b"GIF89a" + png, "not a picture", id="a kind of picture we do not take"),
        pytest.param(lambda png: png[:8], "ends in its header", id="a PNG's first eight bytes"),
        pytest.param(cut_short("png"), "cut short", id="a PNG cut short"),
        pytest.param(cut_short("jpg"), "cut short", id="a JPEG cut short"),
        pytest.param(cut_short("webp"), "cut short", id="a WebP cut short"),
        pytest.param(cut_short("bmp"), "cut short", id="a BMP cut short"),
        pytest.param(lambda png: png[:60] + bytes(60) + png[120:], "damaged", id="a PNG with a hole"),
        pytest.param(lambda png: png_claiming(30_000, 30_000), "30000x30000", id="nine hundred megapixels"),
        pytest.param(lambda png: png_claiming(2**31 - 1, 2**31 - 1), "pixels", id="more pixels than int64"),
        pytest.param(lambda png: png_claiming(0, 28), "no pixels", id="a picture without pixels"),
    ],
)
def test_an_unreadable_picture_is_refused(
    doors: Doors, digit_png: bytes, way: Way, spoil: Callable[[bytes], bytes], says: str
) -> None:
    assert says in way(doors, [spoil(digit_png)], None)


@pytest.mark.parametrize("way", WAYS_FOR_SEVERAL)
@pytest.mark.parametrize("index", [0, 2, 4])
def test_the_picture_at_fault_among_several_is_named(
    doors: Doors, digit_png: bytes, way: Way, index: int
) -> None:
    pictures = [digit_png] * 5
    pictures[index] = b"not a picture"
    assert "not a picture" in way(doors, pictures, index)


def peak_bytes(process: psutil.Process) -> int:
    """The most memory that a process ever held, where the system says so; else what it holds now."""
    status = Path(f"/proc/{process.pid}/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024
    return int(process.memory_info().rss)


def test_a_small_file_of_a_huge_picture_takes_no_memory(quintet_server: QuintetServer, doors: Doors) -> None:
    picture = png_claiming(30_000, 30_000)
    assert len(picture) < 4096
    before = {worker: peak_bytes(worker) for worker in quintet_server.workers()}
    assert before
    for _ in range(10):
        Doors.as_the_body(doors, [picture], None)
        Doors.over_grpc(doors, [picture], None)
    # Decoded, it would be 900 MB.
    assert all(peak_bytes(worker) - held < 100 * MEBIBYTE for worker, held in before.items())


# ---- bodies too large ----


def in_chunks(body: bytes) -> Iterator[bytes]:
    for position in range(0, len(body), MEBIBYTE):
        yield body[position : position + MEBIBYTE]


@pytest.mark.parametrize("path", ["/digit", INFER], ids=["people", "machines"])
@pytest.mark.parametrize(
    ("send", "headers"),
    [
        pytest.param(bytes, {}, id="said in advance"),
        pytest.param(in_chunks, {}, id="in chunks"),
        pytest.param(gzip.compress, {"Content-Encoding": "gzip"}, id="once decompressed"),
        pytest.param(zlib.compress, {"Content-Encoding": "deflate"}, id="once inflated"),
        pytest.param(
            lambda body: gzip.compress(body[: len(body) // 2]) * 2,
            {"Content-Encoding": "gzip"},
            id="both members together",
        ),
    ],
)
def test_a_body_that_is_too_large_is_refused(
    http: httpx.Client, path: str, send: Callable[[bytes], Any], headers: dict[str, str]
) -> None:
    response = http.post(path, content=send(bytes(17 * MEBIBYTE)), headers=headers)
    check = check_problem if path == "/digit" else check_v2_error
    assert "16,777,216" in check(response, 413)


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip], ids=["as it is", "once decompressed"])
def test_a_message_that_is_too_large_is_refused(
    grpc_client: GrpcClient, compression: grpc.Compression | None
) -> None:
    request = infer_request(bytes(17 * MEBIBYTE))
    error = grpc_client.refusal("ModelInfer", request, compression=compression)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_message_of_the_largest_size_is_read(grpc_client: GrpcClient) -> None:
    error = grpc_client.refusal("ModelInfer", infer_request(bytes(16 * MEBIBYTE - 100)))
    assert "784" in check_grpc_error(error, 400)


def test_a_body_of_the_largest_size_is_read(http: httpx.Client) -> None:
    assert "not a picture" in check_problem(http.post("/digit", content=bytes(16 * MEBIBYTE)), 400)


@pytest.mark.parametrize(
    ("body", "coding", "status"),
    [
        pytest.param(b"not gzip", "gzip", 400, id="not compressed at all"),
        pytest.param(b"not deflate", "deflate", 400, id="not deflated at all"),
        pytest.param(gzip.compress(bytes(1000))[:-9], "gzip", 400, id="cut short"),
        pytest.param(gzip.compress(b"digit") + b"more", "gzip", 400, id="something after the end"),
        pytest.param(gzip.compress(b"") * 100_000, "gzip", 400, id="a hundred thousand members"),
        pytest.param(b"", "br", 415, id="brotli"),
        pytest.param(b"", "gzip, gzip", 415, id="gzip twice"),
        pytest.param(b"", "no such coding", 415, id="no coding that there is"),
    ],
)
@pytest.mark.parametrize("path", ["/digit", INFER], ids=["people", "machines"])
def test_a_compressed_body_must_be_what_it_says(
    http: httpx.Client, path: str, body: bytes, coding: str, status: int
) -> None:
    response = http.post(path, content=body, headers={"Content-Encoding": coding})
    (check_problem if path == "/digit" else check_v2_error)(response, status)


# ---- for people: JSON, multipart, headers ----


DEEP = 100_000


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="cut short"),
        pytest.param(b"\xff\xfe{}", id="not UTF-8"),
        pytest.param(b"[" * DEEP + b"]" * DEEP, id="lists too deep"),
        pytest.param(b'{"images":' * DEEP + b"1" + b"}" * DEEP, id="objects too deep"),
        pytest.param(b'["images"]', id="a list"),
        pytest.param(b"7", id="a number"),
        pytest.param(b"{}", id="no field"),
        pytest.param(b'{"image": ["aGVsbG8="]}', id="another field"),
        pytest.param(b'{"images": ["aGVsbG8="], "model": "digit"}', id="one field too many"),
        pytest.param(b'{"images": "aGVsbG8="}', id="a text where a list belongs"),
        pytest.param(b'{"images": []}', id="an empty list"),
        pytest.param(b'{"images": [7]}', id="a number where a picture belongs"),
        pytest.param(b'{"images": [null]}', id="null where a picture belongs"),
        pytest.param(b'{"images": ["not base64!"]}', id="no base64"),
        pytest.param('{"images": ["é"]}'.encode(), id="letters that base64 does not have"),
        pytest.param(b'{"images": ["\\ud800"]}', id="half a letter"),
        pytest.param(b'{"images": ["aGVsbG8"]}', id="base64 without its padding"),
    ],
)
def test_json_for_people_must_be_a_list_of_pictures(http: httpx.Client, body: bytes) -> None:
    check_problem(http.post("/digit", content=body, headers={"Content-Type": "application/json"}), 400)


def test_the_base64_at_fault_among_several_is_named(http: httpx.Client, digit_png: bytes) -> None:
    good = base64.b64encode(digit_png).decode()
    check_problem(http.post("/digit", json={"images": [good, "!", good]}), 400, index=1)


def part(content: bytes, name: str = "images") -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), content)


@pytest.mark.parametrize(
    ("spoil", "content_type"),
    [
        pytest.param(lambda whole: b"", "multipart/form-data; boundary=x", id="nothing"),
        pytest.param(lambda whole: b"--x--\r\n", "multipart/form-data; boundary=x", id="no part"),
        pytest.param(lambda whole: whole, "multipart/form-data", id="no boundary named"),
        pytest.param(lambda whole: whole, "multipart/form-data; boundary=", id="an empty boundary"),
        pytest.param(lambda whole: whole, "multipart/form-data; boundary=y", id="another boundary"),
        pytest.param(
            lambda whole: whole, f"multipart/form-data; boundary={'x' * 300}", id="an endless boundary"
        ),
        pytest.param(lambda whole: whole[1:], "multipart/form-data; boundary=x", id="its start is damaged"),
        pytest.param(lambda whole: whole[:-7], "multipart/form-data; boundary=x", id="its end is missing"),
        pytest.param(lambda whole: whole[:40], "multipart/form-data; boundary=x", id="cut in a header"),
        pytest.param(
            lambda whole: part(b"7", name="label") + whole,
            "multipart/form-data; boundary=x",
            id="a foreign part",
        ),
        pytest.param(
            lambda whole: b"--x\r\n\r\n7\r\n" + whole,
            "multipart/form-data; boundary=x",
            id="a part without name",
        ),
        pytest.param(
            lambda whole: b"--x\r\n: v\r\n\r\n7\r\n" + whole,
            "multipart/form-data; boundary=x",
            id="a header without name",
        ),
        pytest.param(
            lambda whole: b"--x\r\nA: " + b"a" * MEBIBYTE + b"\r\n\r\n7\r\n" + whole,
            "multipart/form-data; boundary=x",
            id="an endless header",
        ),
        pytest.param(
            lambda whole: part(b"") * 100_000 + whole, "multipart/form-data; boundary=x", id="too many parts"
        ),
    ],
)
def test_a_damaged_multipart_body_is_refused(
    http: httpx.Client, digit_png: bytes, spoil: Callable[[bytes], bytes], content_type: str
) -> None:
    whole = part(digit_png) + b"--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert http.post("/digit", content=whole, headers=headers).status_code == 200
    response = http.post("/digit", content=spoil(whole), headers={"Content-Type": content_type})
    check_problem(response, 400)


@pytest.mark.parametrize(
    "media_type",
    ["text/html", "image/gif", "application/x-www-form-urlencoded", "multipart/mixed; boundary=x"],
)
def test_a_media_type_that_is_not_served(http: httpx.Client, digit_png: bytes, media_type: str) -> None:
    response = http.post("/digit", content=digit_png, headers={"Content-Type": media_type})
    assert "image/png" in check_problem(response, 415)


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", "1e400", "", "²", "9" * 5000])
@pytest.mark.parametrize("path", ["/digit", INFER], ids=["people", "machines"])
def test_a_deadline_must_be_a_number_of_milliseconds(http: httpx.Client, path: str, value: str) -> None:
    response = http.post(path, content=b"{}", headers={"Quintet-Timeout-Ms": value.encode("latin-1")})
    check = check_problem if path == "/digit" else check_v2_error
    assert "Quintet-Timeout-Ms" in check(response, 400)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/digit", "POST"),
        ("PUT", "/digit", "POST"),
        ("DELETE", "/digit", "POST"),
        ("POST", "/", "GET, HEAD"),
        ("POST", "/readyz", "GET, HEAD"),
        ("DELETE", "/metrics", "GET, HEAD"),
        ("POST", "/v2", "GET"),
        ("POST", "/v2/health/live", "GET"),
        ("POST", "/v2/health/ready", "GET"),
        ("POST", "/v2/models/digit", "GET"),
        ("POST", "/v2/models/digit/ready", "GET"),
        ("POST", "/v2/models/digit/config", "GET"),
        ("GET", INFER, "POST"),
        ("GET", "/v2/repository/index", "POST"),
        ("GET", "/v2/repository/models/digit/load", "POST"),
    ],
    ids=lambda value: value,
)
def test_a_wrong_method_is_told_the_right_one(http: httpx.Client, method: str, path: str, allow: str) -> None:
    response = http.request(method, path)
    (check_v2_error if path.startswith("/v2") else check_problem)(response, 405)
    assert response.headers["allow"] == allow


@pytest.mark.parametrize(
    "path", ["/nothing", "/digit/", "/digit/1", "/Digit", "/v2digit", "/%2e%2e/models", "/digit%00", "/*"]
)
def test_an_unknown_path_is_refused(http: httpx.Client, path: str) -> None:
    check_problem(http.post(path, content=b"{}"), 404)


# ---- for machines: models and versions ----


NO_SUCH = [
    pytest.param("nothing", "", id="no such model"),
    pytest.param("Digit", "", id="a model is spelt in small letters"),
    pytest.param("x" * 5000, "", id="an endless name"),
    pytest.param("digit", "0", id="version 0"),
    pytest.param("digit", "01", id="version 01"),
    pytest.param("digit", "-1", id="version -1"),
    pytest.param("digit", "999999", id="no such version"),
    pytest.param("digit", "abc", id="a version in letters"),
    pytest.param("digit", "\u0661", id="a version in other digits"),
    pytest.param("digit", "9" * 5000, id="an endless version"),
]


@pytest.mark.parametrize(("model", "version"), NO_SUCH)
def test_an_unknown_model_or_version_over_http(http: httpx.Client, model: str, version: str) -> None:
    path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "")
    check_v2_error(http.get(path), 404)
    check_v2_error(http.get(f"{path}/ready"), 404)
    check_v2_error(http.get(f"{path}/config"), 404)
    check_v2_error(http.post(f"{path}/infer", content=b"{}"), 404)


@pytest.mark.parametrize(("model", "version"), NO_SUCH)
def test_an_unknown_model_or_version_over_grpc(grpc_client: GrpcClient, model: str, version: str) -> None:
    for method in ("ModelReady", "ModelMetadata", "ModelConfig"):
        request = getattr(pb, f"{method}Request")(name=model, version=version)
        check_grpc_error(grpc_client.refusal(method, request), 404)
    request = infer_request(bytes(784), model=model, version=version)
    check_grpc_error(grpc_client.refusal("ModelInfer", request), 404)


@pytest.mark.parametrize(
    "path",
    [
        "/v2/nothing",
        "/v2//models/digit",
        "/v2/models",
        "/v2/models/digit/nothing",
        "/v2/models/digit/versions",
        "/v2/models/digit/versions/1/nothing",
        "/v2/models/..%2f..%2fetc%2fpasswd",
        "/v2/repository",
    ],
)
def test_a_path_that_the_protocol_does_not_have(http: httpx.Client, path: str) -> None:
    check_v2_error(http.get(path), 404)


# ---- for machines: tensors over HTTP ----

ZEROS = [0] * 784


def request_with(**changes: Any) -> bytes:
    """A good request with one input, and what is changed in it."""
    return json.dumps({"inputs": [tensor(**{"data": ZEROS, **changes})]}).encode()


def without(name: str) -> bytes:
    described = tensor(data=ZEROS)
    del described[name]
    return json.dumps({"inputs": [described]}).encode()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        pytest.param(request_with(shape=[-1, 28, 28]), "shape", id="a negative shape"),
        pytest.param(request_with(shape=[2**62, 28, 28]), "inputs", id="a shape that overflows"),
        pytest.param(request_with(shape=[1, 2**62, 2**62]), "elements", id="axes that overflow"),
        pytest.param(request_with(shape=[2**64, 28, 28]), "shape", id="a shape beyond 64 bits"),
        pytest.param(request_with(shape=[10**400]), "JSON", id="a shape beyond floating point"),
        pytest.param(request_with(shape=[1.0, 28, 28]), "whole numbers", id="a shape with a point"),
        pytest.param(request_with(shape=[True, 28, 28]), "whole numbers", id="a shape with a truth"),
        pytest.param(request_with(shape=["1", 28, 28]), "whole numbers", id="a shape of texts"),
        pytest.param(request_with(shape=[None]), "whole numbers", id="a shape of nulls"),
        pytest.param(request_with(shape=[]), "axes", id="a shape without axes"),
        pytest.param(request_with(shape=[1] * 9), "axes", id="a shape of nine axes"),
        pytest.param(request_with(shape={"n": 1}), "shape", id="a shape that is an object"),
        pytest.param(request_with(shape=[1, 784]), "[n, 28, 28]", id="a flat shape"),
        pytest.param(request_with(shape=[1, 28, 28, 1]), "[n, 28, 28]", id="one axis too many"),
        pytest.param(request_with(shape=[0, 28, 28], data=[]), "inputs", id="no inputs"),
        pytest.param(request_with(shape=[257, 28, 28]), "256", id="too many inputs"),
        pytest.param(without("shape"), "shape", id="no shape"),
        pytest.param(without("datatype"), "datatype", id="no datatype"),
        pytest.param(without("name"), "name", id="no name"),
        pytest.param(without("data"), "data", id="no data"),
        pytest.param(request_with(datatype="FP32"), "UINT8", id="another datatype"),
        pytest.param(request_with(datatype="FP64"), "datatype", id="a datatype we do not have"),
        pytest.param(request_with(datatype="uint8"), "datatype", id="a datatype in small letters"),
        pytest.param(request_with(datatype=8), "datatype", id="a datatype that is a number"),
        pytest.param(request_with(datatype="BYTES"), "texts", id="numbers for BYTES"),
        pytest.param(request_with(name="image", shape=[784]), "256", id="another input"),
        pytest.param(request_with(name="digit"), "pixels or image", id="an unknown input"),
        pytest.param(request_with(data=[*ZEROS[1:], 256]), "range", id="a value too large"),
        pytest.param(request_with(data=[*ZEROS[1:], -1]), "range", id="a value too small"),
        pytest.param(request_with(data=[*ZEROS[1:], 2**64]), "another type", id="a value beyond 64 bits"),
        pytest.param(request_with(data=[*ZEROS[1:], 0.5]), "another type", id="half a value"),
        pytest.param(request_with(data=[*ZEROS[1:], True]), "another type", id="a truth"),
        pytest.param(request_with(data=[*ZEROS[1:], "0"]), "another type", id="a text"),
        pytest.param(request_with(data=[*ZEROS[1:], None]), "another type", id="a null"),
        pytest.param(request_with(data=[*ZEROS[1:], {}]), "another type", id="an object"),
        pytest.param(request_with(data=[*ZEROS[1:], float("nan")]), "JSON", id="not a number"),
        pytest.param(request_with(data=[*ZEROS[1:], float("inf")]), "JSON", id="infinity"),
        pytest.param(request_with(data=ZEROS[1:]), "783", id="a value too few"),
        pytest.param(request_with(data=[*ZEROS, 0]), "785", id="a value too many"),
        pytest.param(request_with(data=[[*ZEROS[1:]], 0]), "evenly", id="lists and values side by side"),
        pytest.param(request_with(data="AAAA"), "list", id="a text for all data"),
        pytest.param(request_with(data=0), "list", id="a number for all data"),
        pytest.param(b'{"inputs": [{"name": "pixels", "data": ' + b"[" * DEEP, "JSON", id="data too deep"),
        pytest.param(json.dumps({"inputs": [tensor(data=ZEROS)] * 2}).encode(), "once", id="an input twice"),
        pytest.param(b'{"inputs": []}', "inputs", id="an empty list of inputs"),
        pytest.param(b'{"inputs": {"name": "pixels"}}', "inputs", id="inputs that are no list"),
        pytest.param(b'{"inputs": [7]}', "object", id="an input that is a number"),
        pytest.param(b"{}", "inputs", id="no inputs named"),
        pytest.param(b"[]", "object", id="a list for the request"),
        pytest.param(b"", "JSON", id="nothing"),
        pytest.param(b"{", "JSON", id="cut short"),
        pytest.param(b"\xff", "JSON", id="not UTF-8"),
        pytest.param(b"[" * DEEP + b"]" * DEEP, "JSON", id="too deep"),
    ],
)
def test_a_wrong_tensor_over_http(http: httpx.Client, body: bytes, says: str) -> None:
    assert says in check_v2_error(http.post(INFER, content=body), 400)


@pytest.mark.parametrize(
    "outputs",
    [7, "label", [7], ["label"], [{}], [{"name": 7}], [{"name": "score"}]],
    ids=["a number", "a text", "of numbers", "of texts", "no name", "a number for a name", "an unknown one"],
)
def test_wrong_outputs_over_http(http: httpx.Client, outputs: Any) -> None:
    check_v2_error(http.post(INFER, json={"inputs": [tensor(data=ZEROS)], "outputs": outputs}), 400)


def binary_request(
    raw: bytes, *, size: Any = None, shape: Any = (1,), datatype: str = "BYTES", name: str = "image"
) -> dict[str, Any]:
    size = len(raw) if size is None else size
    head = {"inputs": [tensor(name, datatype, shape, parameters={"binary_data_size": size})]}
    return with_binary(head, raw)


@pytest.mark.parametrize(
    ("request_parts", "says"),
    [
        pytest.param(
            binary_request(binary(b"ab"), size=7), "binary_data_size", id="a size larger than the body"
        ),
        pytest.param(binary_request(binary(b"ab"), size=5), "element", id="a size smaller than the body"),
        pytest.param(binary_request(binary(b"ab"), size=-1), "binary_data_size", id="a negative size"),
        pytest.param(binary_request(binary(b"ab"), size="6"), "binary_data_size", id="a size in quotes"),
        pytest.param(binary_request(binary(b"ab"), size=6.0), "binary_data_size", id="a size with a point"),
        pytest.param(binary_request(binary(b"ab"), size=True), "binary_data_size", id="a truth for a size"),
        pytest.param(
            binary_request(binary(b"ab"), size=2**70), "binary_data_size", id="a size beyond 64 bits"
        ),
        pytest.param(binary_request(b"\xff\xff\xff\xff"), "element", id="an element longer than the body"),
        pytest.param(binary_request(b"\x01"), "element", id="less than a length"),
        pytest.param(binary_request(binary(b"ab", b"cd")), "element", id="more elements than the shape"),
        pytest.param(binary_request(binary(b"ab"), shape=[2]), "element", id="fewer elements than the shape"),
        pytest.param(binary_request(bytes(4 * 10**6), shape=[10**6]), "256", id="a million elements"),
        pytest.param(binary_request(binary(b"ab"), size=0), "element", id="a size of nothing"),
        pytest.param(
            binary_request(bytes(784), shape=[1, 28, 28], datatype="FP32", name="pixels"),
            "3136",
            id="bytes for another datatype",
        ),
        pytest.param(
            binary_request(bytes(783), shape=[1, 28, 28], datatype="UINT8", name="pixels"),
            "784",
            id="a byte too few",
        ),
    ],
)
def test_a_wrong_binary_tensor_over_http(
    http: httpx.Client, request_parts: dict[str, Any], says: str
) -> None:
    assert says in check_v2_error(http.post(INFER, **request_parts), 400)


def test_more_binary_data_than_the_inputs_name(http: httpx.Client) -> None:
    request = binary_request(binary(b"ab"))
    request["content"] += b"more"
    assert "binary data" in check_v2_error(http.post(INFER, **request), 400)


@pytest.mark.parametrize(
    "length", ["5", "1000000", "-1", "+5", "0", "5.0", "abc", "", "²", "9" * 30, "9" * 5000]
)
def test_a_wrong_length_of_the_json_head(http: httpx.Client, length: str) -> None:
    request = binary_request(binary(b"ab"))
    request["headers"]["Inference-Header-Content-Length"] = length.encode("latin-1")
    check_v2_error(http.post(INFER, **request), 400)


# ---- for machines: tensors over gRPC ----


def typed(field: str, values: Sequence[Any], **options: Any) -> Any:
    request = infer_request(**options)
    getattr(request.inputs[0].contents, field).extend(values)
    return request


def changed(request: Any, change: Callable[[Any], object]) -> Any:
    change(request)
    return request


PIXELS = bytes(784)


@pytest.mark.parametrize(
    ("request_message", "says"),
    [
        pytest.param(infer_request(PIXELS, shape=[-1, 28, 28]), "shape", id="a negative shape"),
        pytest.param(infer_request(PIXELS, shape=[2**62, 28, 28]), "inputs", id="a shape that overflows"),
        pytest.param(infer_request(PIXELS, shape=[1, 2**62, 2**62]), "elements", id="axes that overflow"),
        pytest.param(infer_request(PIXELS, shape=[]), "axes", id="a shape without axes"),
        pytest.param(infer_request(PIXELS, shape=[1] * 9), "axes", id="a shape of nine axes"),
        pytest.param(infer_request(PIXELS, shape=[1, 784]), "[n, 28, 28]", id="a flat shape"),
        pytest.param(infer_request(b"", shape=[0, 28, 28]), "inputs", id="no inputs"),
        pytest.param(infer_request(PIXELS, shape=[257, 28, 28]), "256", id="too many inputs"),
        pytest.param(infer_request(PIXELS, datatype=""), "datatype", id="no datatype"),
        pytest.param(infer_request(PIXELS * 4, datatype="FP32"), "UINT8", id="another datatype"),
        pytest.param(infer_request(PIXELS, datatype="FP64"), "datatype", id="a datatype we do not have"),
        pytest.param(infer_request(PIXELS, name=""), "pixels or image", id="no name"),
        pytest.param(infer_request(PIXELS, name="digit"), "pixels or image", id="an unknown input"),
        pytest.param(infer_request(PIXELS, name="x" * 100_000), "pixels or image", id="an endless name"),
        pytest.param(infer_request(PIXELS[1:]), "784", id="a byte too few"),
        pytest.param(infer_request(PIXELS + b"0"), "785", id="a byte too many"),
        pytest.param(infer_request(), "0 values", id="no data"),
        pytest.param(infer_request(PIXELS, PIXELS), "raw_input_contents", id="more data than inputs"),
        pytest.param(typed("uint_contents", [*ZEROS[1:], 256]), "range", id="a value too large"),
        pytest.param(typed("uint_contents", ZEROS[1:]), "783", id="a value too few"),
        pytest.param(typed("int_contents", ZEROS), "0 values", id="values in another field"),
        pytest.param(typed("fp32_contents", [float("nan")] * 784), "0 values", id="not a number"),
        pytest.param(
            typed("fp32_contents", [float("nan")] * 784, datatype="FP32"), "UINT8", id="not a number, as FP32"
        ),
        pytest.param(
            infer_request(b"\xff\xff\xff\xff", name="image", datatype="BYTES", shape=[1]),
            "element",
            id="an element longer than the body",
        ),
        pytest.param(
            infer_request(binary(b"ab"), name="image", datatype="BYTES", shape=[2]),
            "element",
            id="fewer elements than the shape",
        ),
        pytest.param(
            infer_request(bytes(4 * 10**6), name="image", datatype="BYTES", shape=[10**6]),
            "256",
            id="a million elements",
        ),
        pytest.param(
            changed(infer_request(PIXELS), lambda one: one.inputs.append(one.inputs[0])),
            "raw_input_contents",
            id="more inputs than data",
        ),
        pytest.param(
            changed(infer_request(PIXELS, PIXELS), lambda one: one.inputs.append(one.inputs[0])),
            "once",
            id="an input twice",
        ),
        pytest.param(
            changed(infer_request(), lambda one: one.ClearField("inputs")), "inputs", id="no inputs named"
        ),
        pytest.param(infer_request(PIXELS, outputs=["score"]), "output", id="an unknown output"),
        pytest.param(b"\xff\xff\xff\xff", "damaged", id="no message at all"),
        pytest.param(infer_request(PIXELS).SerializeToString()[:-1], "damaged", id="a message cut short"),
        pytest.param(b"\x0a\x02\xff\xfe", "damaged", id="a name that is not UTF-8"),
    ],
)
def test_a_wrong_tensor_over_grpc(grpc_client: GrpcClient, request_message: Any, says: str) -> None:
    assert says in check_grpc_error(grpc_client.refusal("ModelInfer", request_message), 400)


@pytest.mark.parametrize("method", ["ModelReady", "ModelMetadata", "ModelConfig", "RepositoryIndex"])
def test_a_damaged_message_over_grpc(grpc_client: GrpcClient, method: str) -> None:
    assert "damaged" in check_grpc_error(grpc_client.refusal(method, b"\xff\xff"), 400)


# ---- callers who hang up, and the end ----


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /digit HTTP/1.1\r\nHost: quintet\r\nContent-Length: 1000\r\n\r\nhalf",
        b"POST /digit HTTP/1.1\r\nHost: quintet\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"POST /digit HTTP/1.1\r\nHost: quin",
        b"no HTTP at all\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=["in the body", "in a chunk", "in the headers", "after nonsense", "after a TLS greeting"],
)
def test_a_caller_who_hangs_up_halfway_harms_nobody(quintet_server: QuintetServer, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", quintet_server.http_port)) as connection:
        connection.sendall(sent)


def test_none_of_this_was_our_fault(quintet_server: QuintetServer, http: httpx.Client) -> None:
    log = quintet_server.log_text()
    assert '"event": "ready"' in log
    for sign in ("Traceback", '"level": "error"', "exception in ASGI", "Exception in callback", "[ERROR]"):
        assert sign not in log
    assert 'outcome="400"' in http.get("/metrics").text
    assert 'outcome="500"' not in http.get("/metrics").text
