"""What a grader waits for on the review page: `bench_review.py --out FILE.json`. Needs Debian's chromium.

A local archive of photographs of 12 megapixels, the page in a fresh browser: first contentful paint, the first
photograph, which nothing has prepared, and each next one after a look of some seconds, from the key to its first tiles
on the screen and to all that the screen shows. Then a worklist of many rows: a page from its middle.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ma_cluster import machine
from ma_cluster.archive.outcomes import SCHEMA
from ma_cluster.archive.run import read_run
from ma_cluster.images.sample import enlarged_sample
from ma_cluster.review.worklist import Query, Worklist

sys.path.insert(0, str(Path(__file__).parents[1]))
from browser import chromium, new_page
from review_runs import commit_run, review_page, small_run

_SHOWN = "#photograph[data-shown-ms]"


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--side-px", type=int, default=3464)
    parser.add_argument("--photographs", type=int, default=6)
    parser.add_argument("--look-s", type=float, default=3.0)
    parser.add_argument("--rows", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        figures = _page(Path(root) / "page", arguments) | _rows(Path(root) / "rows", arguments.rows)
    settings = {"side_px": arguments.side_px, "look_s": arguments.look_s}
    report = {"benchmark": "review", "machine": machine.describe(), **settings, **figures}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def _page(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    data, mask = enlarged_sample(arguments.side_px)
    dest = commit_run(root, {f"eye-{number}.jpg": (data, mask) for number in range(arguments.photographs)})
    with chromium() as browser, review_page(dest.url, "bench") as url:
        page = new_page(browser, [], bypass_csp=True)
        page.goto(url)
        page.wait_for_selector(".row .name")
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        page.keyboard.press("Enter")
        page.wait_for_selector(_SHOWN)
        first, waits = _waited(page), []
        for _ in range(arguments.photographs - 1):
            page.wait_for_timeout(1000 * arguments.look_s)
            page.evaluate("document.getElementById('photograph').removeAttribute('data-shown-ms')")
            page.keyboard.press("ArrowRight")
            page.wait_for_selector(_SHOWN)
            waits.append(_waited(page))
    return {"first_paint_ms": round(paint), "first_photograph_ms": first, "next_photograph_ms": waits}


def _waited(page: Any) -> int:
    return int(page.get_attribute("#photograph", "data-shown-ms"))


def _rows(root: Path, rows: int) -> dict[str, Any]:
    dest = small_run(root, 1, 300)
    run = read_run(dest)
    assert run is not None
    worklist, rng = Worklist(dest, run), np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    for part, start in enumerate(range(0, rows, 256)):
        number = min(256, rows - start)
        values = {name: [None] * number for name in SCHEMA.names} | {
            "key": [f"site/{part}/eye-{place}.jpg" for place in range(number)],
            "status": ["scored"] * number,
            "image_score": rng.random(number).tolist(),
            "lesion_count": rng.integers(0, 50, number).tolist(),
            "triage": rng.choice(["none", "refer"], number).tolist(),
            "flags": [[]] * number,
        }
        worklist._add(pa.Table.from_pydict(values, schema=SCHEMA).to_pylist(), 0, 10_000 + part)
    indexed = time.perf_counter() - began
    seconds = {}
    for name, query in {"worst": Query(), "by_score": Query(sort="score"), "by_name": Query(text="eye-7")}.items():
        began = time.perf_counter()
        page = worklist.page(query, rows // 40, 100)
        seconds[name] = round(1000 * (time.perf_counter() - began), 1)
        assert page.total > 0
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    worklist.close()
    return {"rows": rows, "indexed_s": round(indexed, 1), "page_ms": seconds, "grown_mib": round(grown)}


if __name__ == "__main__":
    main()
