"""The benchmarks of developers, each once and small: they run, and write what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = {
    "ledger": ["--sizes", "20000", "--repeats", "1", "--cluster-shards", "2"],
    "keys": ["--sizes", "200", "400"],
    "plan": ["--photographs", "2"],
    "poison": ["--photographs", "10"],
    "soak": ["--minutes", "0.3", "--every", "3", "--job-every", "5"],
    "review": ["--side-px", "900", "--photographs", "3", "--look-s", "0.5", "--rows", "1000"],
    "patch_stream": ["--side-px", "400", "--steps", "4", "--lead-steps", "2", "--rounds", "1", "--step-ms", "1"],
}


@pytest.mark.long
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_runs_and_describes_its_machine(name: str, tmp_path: Path) -> None:
    script, out = Path(__file__).with_name(f"bench_{name}.py"), tmp_path / "figures.json"
    subprocess.run([sys.executable, str(script), *SCRIPTS[name], "--out", str(out)], check=True, timeout=300)
    figures = json.loads(out.read_text())
    assert figures["benchmark"] == name
    assert figures["machine"]["cores"] >= 1
