"""The service's own page, as a program and as a browser get it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import accessibility_faults, chromium, new_page
from known_service import GUARDED, LIMITS, TOKEN, Known, served
from photographs import encode, noise_photograph

from ma_cluster.config import ScoreOptions
from ma_cluster.http.api import NOTICE, Answer
from ma_cluster.http.guard import HttpLimits

HOSTILE = "<img src=x onerror=alert(1)>"
LESION = {"id": 1, "row": 40.0, "col": 60.0, "diameter_px": 8.0}
SCORED = {
    "lesions": [LESION], "width": 120, "height": 100, "triage": "refer", "image_score": 0.75, "quality": 0.8,
    "gradable": True, "detail": None,
}  # fmt: skip


class Seeing(Known):
    """Finds one lesion on whatever it is given, and has one archive whose names are HTML."""

    def segment(self, data: bytes, options: ScoreOptions) -> Answer:
        return Answer(SCORED, b"", b"")

    def archives(self) -> list[dict[str, Any]]:
        return [
            {"id": "abc", "state": "running", "source": HOSTILE, "destination": "s3://b", "requested": "2026-11-27T1"}
        ]

    def archive(self, job_id: str) -> dict[str, Any]:
        return self.archives()[0] | {"status": {"images": 10, "decided": 4}}


def test_programs_get_json_and_browsers_a_page() -> None:
    with served(GUARDED) as server:
        status, told, _ = server.ask("GET", "/")
        assert (status, told["notice"]) == (200, NOTICE)
        status, page, headers = server.ask("GET", "/", accept="text/html,application/xhtml+xml,*/*;q=0.8")
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "unsafe" not in headers["content-security-policy"]
        assert b"onclick" not in page
        assert b"style=" not in page
        assert server.ask("GET", "/page/service.js")[0] == 200
        assert server.ask("GET", "/page/api.py")[0] == 404


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_photograph_is_dropped_and_archives_are_watched(scheme: str, tmp_path: Path) -> None:
    (tmp_path / "eye.jpg").write_bytes(encode(noise_photograph((100, 120)), "JPEG"))
    faults: list[str] = []
    with chromium() as browser, served(HttpLimits(), Seeing()) as server:
        page = new_page(browser, faults, color_scheme=scheme)
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector("#health.up")
        assert NOTICE in page.inner_text("header")
        page.wait_for_selector("#jobs >> text=4 of 10")
        assert HOSTILE in page.inner_text("#jobs")
        page.set_input_files("#file", tmp_path / "eye.jpg")
        page.wait_for_selector("#picture circle.line", state="attached")
        assert page.locator("#facts >> text=Refer").count() == 1
        assert faults == []
        checked = new_page(browser, [], color_scheme=scheme, bypass_csp=True)
        checked.goto(f"http://127.0.0.1:{server.port}/")
        checked.wait_for_selector("#jobs >> text=4 of 10")
        assert accessibility_faults(checked) == []


@pytest.mark.slow
def test_the_page_asks_for_the_token() -> None:
    with chromium() as browser, served(GUARDED, Seeing()) as server:
        page = new_page(browser, [])
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.fill("#token input", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#token[open]")
        page.fill("#token input", TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector("#jobs >> text=4 of 10")


def test_pages_are_not_in_the_description_for_programs() -> None:
    with served(LIMITS) as server:
        assert "/page/{name}" not in server.ask("GET", "/openapi.json")[1]["paths"]
