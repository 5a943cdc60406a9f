"""The benchmarks of developers, each once and small: they run, and write what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from simulate_fleet import Scenario, Simulation

SCRIPTS = {
    "ledger": ["--sizes", "20000", "--repeats", "1", "--cluster-shards", "2"],
    "keys": ["--sizes", "200", "400"],
    "rate": ["--photographs", "4", "--raylets", "1"],
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


@pytest.mark.parametrize("seed", range(3))
def test_a_simulated_fleet_spends_its_time_on_what_is_committed_or_says_that_it_is_lost(seed: int) -> None:
    calm = Scenario(images=2000, nodes=4, segment_s=10.0, spread=0.0)
    whole = Simulation(calm, seed).run()
    assert (whole.lost_s, whole.failed, whole.preemptions) == (0.0, 0, 0)
    assert whole.useful_s == pytest.approx(2000 * 10.0)
    assert whole.now > 2000 * 10.0 / 16
    stormy = replace(calm, preempted_per_node_hour=2.0)
    cut_short, once_more = Simulation(stormy, seed).run(), Simulation(stormy, seed).run()
    assert cut_short.preemptions > 0 and cut_short.lost_s > 0 and cut_short.now > whole.now
    assert cut_short.useful_s == pytest.approx((2000 - cut_short.failed) * 10.0)
    assert (cut_short.now, cut_short.lost_s) == (once_more.now, once_more.lost_s)
