"""The pages of reports in a real browser: nothing is forbidden by their policy, and nobody is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import accessibility_faults, chromium, new_page
from review_runs import small_run
from test_training_report import a_run

from ma_cluster.report.run_report import write_report
from ma_cluster.report.training_report import write_training_report


@pytest.mark.slow
def test_axe_finds_no_serious_fault_in_reports_light_or_dark(tmp_path: Path) -> None:
    a_run(tmp_path / "training", None)
    urls = [write_report(small_run(tmp_path).url, 2.0), write_training_report(str(tmp_path / "training"))]
    faults: list[str] = []
    with chromium() as browser:
        for scheme in ("light", "dark"):
            for url in urls:
                page = new_page(browser, faults, color_scheme=scheme)
                page.goto(f"file://{url}")
                assert page.evaluate("getComputedStyle(document.querySelector('.card')).borderTopWidth") == "1px"
                checked = new_page(browser, [], color_scheme=scheme, bypass_csp=True)
                checked.goto(f"file://{url}")
                assert accessibility_faults(checked) == []
    assert faults == []
