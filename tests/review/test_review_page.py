"""The review page in a real browser, as a grader uses it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import accessibility_faults, chromium, new_page
from photographs import encode
from review_runs import commit_run, dotted, review_page
from servers import free_ports

from ma_cluster.archive.outcomes import Identity
from ma_cluster.archive.run import read_run
from ma_cluster.review.events import Event, read_events, standing
from ma_cluster.storage.local import LocalStore

HOSTILE = "<script>window.hacked=1<:script><img src=x onerror=hacked=1>.jpg"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def dest(tmp_path: Path) -> LocalStore:
    """Two photographs with 6 and 4 lesions, and one that was refused; the first has HTML in its key."""
    pixels, mask = dotted(900, 6)
    others, fewer = dotted(900, 4, 1)
    known = {HOSTILE: (encode(pixels, "JPEG"), mask), "eye.jpg": (encode(others, "JPEG"), fewer), "x.jpg": (b"x", None)}
    return commit_run(tmp_path, known)


def events(dest: LocalStore) -> list[Event]:
    run = read_run(dest)
    assert run is not None
    return list(read_events(dest, run.id))


def open_first(page: Any, url: str) -> None:
    """Go to the worklist and open its first photograph by the keyboard."""
    page.goto(url)
    page.wait_for_selector(".row .name")
    page.keyboard.press("Enter")
    page.wait_for_selector("#lesions li")
    page.wait_for_selector("#photograph[data-shown-ms]")


def saved(page: Any) -> None:
    page.wait_for_selector("#state >> text=all saved")


def test_a_grader_walks_judges_draws_undoes_and_finds_it_again(browser: Any, dest: LocalStore) -> None:
    faults: list[str] = []
    with review_page(dest.url, "ada") as url:
        page = new_page(browser, faults)
        open_first(page, url)
        assert page.inner_text("#title") == HOSTILE
        page.keyboard.press("ArrowDown")
        page.keyboard.press("a")
        page.keyboard.press("x")
        page.keyboard.press("x")
        page.keyboard.press("z")
        page.keyboard.press("2")
        for toggle in (" ", "m", " "):
            page.keyboard.press(toggle)
        assert page.get_attribute("#outlines", "aria-pressed") == "true"
        page.keyboard.press("f")
        page.wait_for_timeout(600)
        page.keyboard.press("d")
        box = page.locator("#photograph").bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(middle[0], middle[1])
        page.mouse.down()
        for right, down in ((30, 0), (30, 30), (0, 30), (0, 4)):
            page.mouse.move(middle[0] + right, middle[1] + down, steps=3)
        page.mouse.up()
        page.wait_for_selector("#lesions li.chosen >> text=drawn")
        page.keyboard.press("Enter")
        page.wait_for_selector("#title >> text=eye.jpg")
        saved(page)
        own = standing(events(dest))
        assert (own.verdicts, own.grade, own.done) == ({1: True, 2: False}, "moderate", True)
        (polygon,) = own.drawn.values()
        assert all(440 < value < 500 for point in polygon for value in point)
        page.reload()
        page.wait_for_selector("#lesions li")
        page.keyboard.press("Escape")
        page.wait_for_selector(".row >> text=✓ done")
        page.keyboard.press("Enter")
        page.wait_for_selector("#lesion-count >> text=2 of 6 judged, 1 drawn")
        assert page.evaluate("window.hacked") is None
        page.context.close()
    assert faults == []


@pytest.mark.slow
def test_two_reviewers_see_each_others_decisions_and_keep_their_own(browser: Any, dest: LocalStore) -> None:
    faults: list[str] = []
    with review_page(dest.url) as url:
        pages = {}
        for name in ("ada", "bob"):
            page = pages[name] = new_page(browser, faults)
            page.goto(url)
            page.fill("#name input", name)
            page.keyboard.press("Enter")
            page.wait_for_selector(".row .name")
            page.keyboard.press("Enter")
            page.wait_for_selector("#lesions li")
            page.keyboard.press("ArrowDown")
        pages["ada"].keyboard.press("a")
        pages["bob"].keyboard.press("x")
        for name, other in (("ada", "bob"), ("bob", "ada")):
            pages[name].wait_for_selector(f"#others >> text={other}")
        assert pages["ada"].locator("#lesions li >> text=accepted").count() == 1
        assert pages["bob"].locator("#lesions li >> text=rejected").count() == 1
        for page in pages.values():
            page.context.close()
    assert {event.reviewer: event.kind for event in events(dest)} == {"ada": "accept", "bob": "reject"}
    assert faults == []


@pytest.mark.slow
def test_what_is_decided_while_the_service_is_down_is_saved_once_it_is_back(browser: Any, dest: LocalStore) -> None:
    page, port = new_page(browser, []), free_ports(1)[0]
    with review_page(dest.url, "ada", port) as url:
        open_first(page, url)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("a")
    page.keyboard.press("x")
    page.wait_for_selector("#offline >> text=2 decisions are kept")
    assert page.inner_text("#state") == "2 not yet saved"
    assert events(dest) == []
    with review_page(dest.url, "ada", port) as url:
        saved(page)
        assert page.is_hidden("#offline")
        assert standing(events(dest)).verdicts == {1: True, 2: False}
        page.context.close()


@pytest.mark.slow
def test_the_visit_before_lies_beside_a_photograph(browser: Any, tmp_path: Path) -> None:
    faults: list[str] = []
    found = {"new.jpg": dotted(600, 6), "old.jpg": dotted(600, 3, 1)}
    known = {name: (encode(pixels, "JPEG"), mask) for name, (pixels, mask) in found.items()}
    visits = {"new.jpg": "2026-03-01", "old.jpg": "2025-02-01"}
    identities = {name: Identity(patient="p1", eye="R", visit=visit) for name, visit in visits.items()}
    with review_page(commit_run(tmp_path, known, identities).url, "ada") as url:
        page = new_page(browser, faults)
        open_first(page, url)
        assert page.inner_text("#title") == "new.jpg"
        page.keyboard.press("b")
        page.wait_for_selector("#earlier-photograph[data-shown-ms]")
        assert page.inner_text("#earlier-caption") == "Visit before: 2025-02-01, 3 lesions"
        page.keyboard.press("ArrowRight")
        page.wait_for_selector("#title >> text=old.jpg")
        assert page.is_hidden("#earlier")
        assert page.is_hidden("#beside")
        page.context.close()
    assert faults == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(browser: Any, dest: LocalStore, scheme: str) -> None:
    with review_page(dest.url, "ada") as url:
        page = new_page(browser, [], color_scheme=scheme, bypass_csp=True)
        page.goto(url)
        page.wait_for_selector(".row .name")
        assert accessibility_faults(page) == []
        page.keyboard.press("?")
        assert accessibility_faults(page) == []
        page.keyboard.press("Escape")
        page.keyboard.press("Enter")
        page.wait_for_selector("#lesions li")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("a")
        assert accessibility_faults(page) == []
        page.context.close()
