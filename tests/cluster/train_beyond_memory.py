"""A training run on a local Ray whose object store is too small: `train_beyond_memory.py DATA OUT`, run by a test.

Prints how much was spilled, and the losses, as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray._private.internal_api import memory_summary

from ma_cluster.cluster.train_hgn import train_hgn
from ma_cluster.cluster.train_progress import Progress
from ma_cluster.cluster.train_request import TrainRequest
from ma_cluster.config import ImageConfig, tiny

STORE_BYTES = 80 * 2**20
"""Little more than Ray's least."""
SIDE_PX = 1400


def request_for(data: Path, out: Path, **changes: Any) -> TrainRequest:
    """A run on photographs of 9 MB each."""
    image = ImageConfig(fov_diameter_px=0.97 * SIDE_PX)
    detector = replace(tiny().detector, tile_px=512, halo_px=64)
    recipe = replace(tiny(), image=image, detector=detector)
    usual = {"epoch_steps": 4, "threads": 1, "batch_norm": "frozen", "seed": 3}
    return TrainRequest(network="hgn_1x", data=str(data), out=str(out), recipe=recipe, **(usual | changes))


def main() -> None:
    """Train, and look at the object store at the end of the epoch."""
    spilled: list[int] = []

    def look(progress: Progress) -> None:
        if progress.epoch is not None:
            found = re.search(r"Spilled (\d+) MiB", memory_summary(stats_only=True))
            spilled.append(int(found[1]) if found else 0)

    request = request_for(Path(sys.argv[1]), Path(sys.argv[2]), object_store_bytes=STORE_BYTES)
    result = train_hgn(request, on_progress=look)
    losses = [epoch.losses for epoch in result.epochs]
    sys.stdout.write(json.dumps({"spilled_mib": spilled[-1], "losses": losses}) + "\n")


if __name__ == "__main__":
    main()
