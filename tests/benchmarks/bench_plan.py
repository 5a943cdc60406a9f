"""What `ma-cluster plan` says of a sample archive beside what its run takes, on this machine.

    bench_plan.py [--photographs 8] [--model lite] --out plan.json

Twice: by the photographs that the plan scores for itself before the run, and by the run's own stages after it. Each in
a process of its own, Ray's start included, as a user has them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ma_cluster import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=8)
    parser.add_argument("--model", default="lite")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ma-plan-") as folder:
        run("sample", f"{folder}/archive", "--images", str(given.photographs))
        source = f"{folder}/archive/A. Segmentation/1. Original Images"
        before = said(source, "--model", given.model)
        began = time.monotonic()
        run("score", source, f"{folder}/run", "--model", given.model)
        seconds = time.monotonic() - began
        after = said(source, "--like", f"{folder}/run")
    rows = [
        {
            "by": forecast["stages"]["by"],
            "said_seconds": forecast["forecast"]["seconds"],
            "seconds": seconds,
            "ratio": forecast["forecast"]["seconds"] / seconds,
            "stages": forecast["stages"]["seconds"],
            "bottleneck": forecast["forecast"]["bottleneck"],
        }
        for forecast in (before, after)
    ]
    report = {"benchmark": "plan", "machine": machine.describe(), "photographs": given.photographs, "rows": rows}
    given.out.write_text(json.dumps(report, indent=2) + "\n")
    for row in rows:
        print(json.dumps(row))  # noqa: T201


def said(source: str, *options: str) -> dict[str, Any]:
    forecast: dict[str, Any] = json.loads(run("plan", source, *options, "--json"))
    return forecast


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "ma_cluster", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
