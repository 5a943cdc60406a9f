"""What photographs that kill their decoder cost an archive run: `bench_poison.py --out FILE.json`.

Runs over as many photographs each, of which none, a tenth and a half make the process that decodes them exit or abort;
each of those is tried twice. The networks are tiny, so that decoding, and the deaths, are most of the work: with larger
ones they cost less.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
from PIL import Image

from ma_cluster import machine
from ma_cluster.images.sample import retina

sys.path.insert(0, str(Path(__file__).parents[1]))
from decoders import ABORT, EXIT
from untrained import untrained_bundle

from ma_cluster.bundle import save_bundle
from ma_cluster.cluster.fleet.driver import score_archive
from ma_cluster.cluster.fleet.replicas import Fleet
from ma_cluster.cluster.fleet.workers import Progress
from ma_cluster.images.sandbox import SandboxConfig
from ma_cluster.storage.local import LocalStore

SHARES = (0.0, 0.1, 0.5)
FLEET = Fleet(segmenters=2, sandbox=SandboxConfig(children=2, decoder="decoders:decode"))


def main() -> None:
    """Measure each share and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photographs", type=int, default=200, help="of each run")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(address="local", _node_ip_address="127.0.0.1", num_cpus=6, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        save_bundle(untrained_bundle(), model)
        runs = [measure(model, Path(folder, str(share)), arguments.photographs, share) for share in SHARES]
    ray.shutdown()
    for run in runs:
        run["rate_over_that_without"] = run["sound_per_second"] / runs[0]["sound_per_second"]
    report = {"benchmark": "poison", "machine": machine.describe(), "runs": runs}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def measure(model: Path, folder: Path, photographs: int, share: float) -> dict[str, Any]:
    """One run: its rate of sound photographs, without what comes once."""
    source, eye = LocalStore(folder / "source"), photograph()
    poison = round(photographs * share)
    for number in range(photographs):
        dies = number * poison // photographs != (number + 1) * poison // photographs
        source.create(f"{number:04d}.jpg", ((ABORT, EXIT)[number % 2] if dies else b"") + eye)
    progress: list[Progress] = []
    summary = score_archive(source.url, f"{folder}/dest", FLEET, model=str(model), on_progress=progress.append)
    assert summary.counts.statuses.get("failed", 0) == poison, "no sound photograph has failed, and no other was scored"
    rate = progress[-1].images_per_second
    assert rate is not None
    return {"poison_share": share, "photographs": photographs, "sound_per_second": rate * (1 - share)}


def photograph() -> bytes:
    """A real photograph of two megapixels, encoded."""
    out = io.BytesIO()
    Image.fromarray(retina()).save(out, "JPEG", quality=92)
    return out.getvalue()


if __name__ == "__main__":
    main()
