"""What the service sends of the page: the right types, a strict policy, and no address but its own."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT, StartQuintet

WEB = ROOT / "clients" / "web"
ASSETS = sorted(path for path in (WEB / "assets").rglob("*") if path.is_file())
TEXTS = [path for path in (WEB / "index.html", *ASSETS) if path.suffix in (".html", ".css", ".js")]
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def test_a_browser_gets_the_page(quintet_server: Any) -> None:
    answer = httpx.get(quintet_server.http_url, headers=BROWSER)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.content == (WEB / "index.html").read_bytes()


def test_a_program_gets_json(quintet_server: Any) -> None:
    answer = httpx.get(quintet_server.http_url)
    assert answer.json()["name"] == "quintet"
    assert answer.headers["vary"] == "accept"


@pytest.mark.parametrize("path", ASSETS, ids=lambda path: path.name)
def test_every_file_is_sent_as_what_it_is(path: Path, quintet_server: Any) -> None:
    answer = httpx.get(f"{quintet_server.http_url}/{path.relative_to(WEB).as_posix()}")
    kinds = {".css": "text/css", ".js": "text/javascript", ".woff2": "font/woff2", ".jpg": "image/jpeg"}
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(kinds.get(path.suffix, "image/png"))
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.content == path.read_bytes()


@pytest.mark.parametrize("path", ["/assets/missing.js", "/assets/", "/assets/../index.html", "/index.html"])
def test_nothing_else_is_sent(path: str, quintet_server: Any) -> None:
    assert httpx.get(quintet_server.http_url + path).status_code == 404


def test_the_page_cannot_be_posted_to(quintet_server: Any) -> None:
    assert httpx.post(f"{quintet_server.http_url}/assets/main.js").status_code == 405


def test_the_policy_is_strict(quintet_server: Any) -> None:
    policy = httpx.get(quintet_server.http_url, headers=BROWSER).headers["content-security-policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_the_page_knows_no_address_but_its_own(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"(?:https?:)?//[a-z][\w-]*\.[a-z]+", re.sub(r"^\s*//.*$", "", text, flags=re.M)) == []


def test_the_page_holds_no_script_and_no_style() -> None:
    page = (WEB / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*\ssrc=)", page)


def test_the_page_is_light() -> None:
    assert sum(path.stat().st_size for path in (WEB / "index.html", *ASSETS)) < 256 * 1024


def test_the_bento_carries_the_page() -> None:
    assert '- "/clients/web/"' in (ROOT / "bentofile.yaml").read_text()


def test_a_service_without_the_page_still_serves(start_quintet: StartQuintet, tmp_path: Path) -> None:
    with start_quintet(workers=1, page=tmp_path) as quintet:
        assert httpx.get(quintet.http_url, headers=BROWSER).json()["name"] == "quintet"
