"""A browser for the page, and the service that sends it."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from .browser import Browser, are_installed, start_browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all; where there is none, the tests that need it say so."""
    if not are_installed():
        reason = "needs Debian's packages chromium and chromium-driver"
        if os.environ.get("QUINTET_BROWSER") == "required":  # set where they were just installed
            pytest.fail(reason)
        pytest.skip(reason)
    with start_browser() as started:
        yield started


@pytest.fixture
def page(browser: Browser, quintet_server: Any) -> Iterator[Browser]:
    """The page, fresh and awake, on a desk by day; it may not complain of anything."""
    browser.look(1280, 900)
    browser.console()
    browser.open(quintet_server.http_url)
    browser.wait(lambda: browser.text("#health-words") == "ready", "the service is called ready")
    yield browser
    complaints = browser.console()
    assert complaints == []
