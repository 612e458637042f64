"""Fixtures of the browser tests.

`lab(folder)` starts a JupyterLab, `tab` is a fresh page, `lessons` a copy of the lessons to work in. A failed test
leaves a picture of the page.
"""
import contextlib
import shutil
from pathlib import Path

import pytest
from labkit import REPOSITORY, Chromium, Lab

_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.stash[_failed] = True
    return report


# For a module, not for the session: while Playwright is on, an event loop runs in this thread, and tests elsewhere
# may want one of their own.
@pytest.fixture(scope="module")
def chromium():
    with Chromium() as browser:
        yield browser


@pytest.fixture
def tab(chromium, tmp_path, request):
    """A page that may talk to this machine only; the test fails if it tried otherwise."""
    page = chromium.tab()
    yield page
    if request.node.stash.get(_failed, False):
        picture = tmp_path / "failed.png"
        with contextlib.suppress(Exception):
            page.page.screenshot(path=str(picture))
        print(f"picture: {picture}", *page.console[-20:], sep="\n")
    page.close()
    assert page.refused == [], "the page asked for addresses outside this machine"


@pytest.fixture
def lab(tmp_path_factory):
    """lab(root, settings=..., env=...) starts a JupyterLab on a folder; it ends with the test."""
    with contextlib.ExitStack() as running:
        def start(root, **options) -> Lab:
            return running.enter_context(Lab(root, tmp_path_factory.mktemp("lab"), **options))
        yield start


@pytest.fixture
def lessons(tmp_path) -> Path:
    """A copy of lessons/, as a student finds it: what is solved in it is forgotten with the test."""
    copy = tmp_path / "lessons"
    shutil.copytree(REPOSITORY / "lessons", copy, ignore=shutil.ignore_patterns(".*"))
    return copy
