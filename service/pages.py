"""The page to try the models on: files of a folder, read once at start and sent as they are.

`index.html` is what a browser gets at `/`; what lies in the folder `assets` it finds under
`/assets/`. All else of the page, its scripts included, is no business of this package.
"""

from pathlib import Path
from typing import Final

from service.http import Response

MEDIA_TYPES: Final = {
    ".css": b"text/css; charset=utf-8",
    ".html": b"text/html; charset=utf-8",
    ".jpg": b"image/jpeg",
    ".js": b"text/javascript; charset=utf-8",
    ".png": b"image/png",
    ".svg": b"image/svg+xml",
    ".woff2": b"font/woff2",
}
"""What may lie in the folder, by its ending; files of other endings are not sent."""

POLICY: Final = b"; ".join(
    (
        b"default-src 'none'",
        b"script-src 'self'",
        b"style-src 'self'",
        b"font-src 'self'",
        b"connect-src 'self'",
        b"img-src 'self' blob: data:",
        b"base-uri 'none'",
        b"form-action 'none'",
        b"frame-ancestors 'none'",
        b"require-trusted-types-for 'script'",
        b"trusted-types 'none'",
    )
)
"""The page asks its own service only, holds no script or style in its text, and is nobody's frame."""

SECURITY: Final = (
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
)


def read_page(folder: Path) -> dict[str, Response]:
    """The page's files by the path that each is asked for; empty where there is no page.

    `/` is its text for browsers. Fonts and pictures may be kept for a day; what may change with
    the service is asked for anew.
    """
    index = folder / "index.html"
    if not index.is_file():
        return {}
    page = {"/": _response(index)}
    for path in sorted((folder / "assets").rglob("*")):
        if path.is_file() and path.suffix in MEDIA_TYPES:
            page[f"/{path.relative_to(folder).as_posix()}"] = _response(path)
    return page


def _response(path: Path) -> Response:
    is_code = path.suffix in (".html", ".css", ".js")
    headers = [*SECURITY, (b"cache-control", b"no-cache" if is_code else b"max-age=86400")]
    if path.name == "index.html":
        headers.append((b"vary", b"accept"))
    return Response(200, MEDIA_TYPES[path.suffix], path.read_bytes(), tuple(headers))
