"""A training run on a local Ray whose object store is too small: `train_beyond_memory.py DATA OUT`, run by a test.

Prints the losses as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ma_cluster.cluster.training.launch import train_on_ray
from ma_cluster.config import ImageConfig, tiny
from ma_cluster.training.run import TrainRequest

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
    """Train in a Ray of its own."""
    request = request_for(Path(sys.argv[1]), Path(sys.argv[2]), object_store_bytes=STORE_BYTES)
    sys.stdout.write(json.dumps([epoch.losses for epoch in train_on_ray(request).epochs]) + "\n")


if __name__ == "__main__":
    main()
