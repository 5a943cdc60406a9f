"""How fast patches reach training, beside torch's DataLoader and WebDataset: `bench_patch_stream.py --out FILE.json`.

All three cut the same sizes from the same photograph files with two processes, and augment with the same functions:

    stream       Ray Data tasks cut from photographs prepared once in the object store; two consumers take half each
    dataloader   torch.utils.data.DataLoader, two workers, each of which has prepared all photographs; one consumer
    webdataset   patches cut once into tar shards, read and augmented by two workers; it cannot draw others each epoch

The sides take turns epoch by epoch, so that the ratios hold whatever else the machine does. First epochs, in which the
photographs are prepared, are not counted, nor are the first steps of each turn, which may have been cut while others
were measured. Each side is read by a consumer that only drains, and by one that takes `--step-ms` after each
mini-batch, as a step on an accelerator would. The stream is measured twice: opened once for all steps, and opened anew
for each epoch, as training does, since an epoch of the refinement draws by the losses of the last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import ray
import torch
from patch_peers import SEED, WORKERS, Epoch, consume, figures_of, loader, webdataset_side

sys.path.insert(0, str(Path(__file__).parents[1]))
from fundus_set import write_training_set

from ma_cluster import machine
from ma_cluster.cluster.training.patch_stream import (
    open_streams,
    prepare_photographs,
    read_stream,
)
from ma_cluster.config import HgnConfig, ImageConfig, SplitConfig, lite
from ma_cluster.hypotheses.hgn_training import HgnCuts, hgn_batch
from ma_cluster.images.datasets import Sample, read_dataset
from ma_cluster.training.context import HgnCutter, Work, share

_AHEAD_BYTES = 2**28  # of patches cut before they are asked for: fewer than `--lead-steps` deliver


def main() -> None:
    """Measure all sides in turn and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--side-px", type=int, default=1400, help="of the photographs")
    parser.add_argument("--steps", type=int, default=500, help="mini-batches of an epoch")
    parser.add_argument("--lead-steps", type=int, default=300, help="of each turn that are not counted")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each side and kind of consumer")
    parser.add_argument("--step-ms", type=float, default=30.0, help="of the consumer that trains")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config, image = lite().hgn_half, ImageConfig(fov_diameter_px=0.97 * arguments.side_px)
    with tempfile.TemporaryDirectory() as folder:
        write_training_set(Path(folder), arguments.side_px)
        samples = read_dataset(folder, SplitConfig())
        every_step = 2 * (arguments.rounds + 1) * (arguments.steps + arguments.lead_steps)
        sides = streams(samples, image, config, every_step) | {"dataloader": loader(samples, image, config)}
        sides |= webdataset_side(samples, image, config, Path(folder))
        figures = measure(sides, arguments)
        ray.shutdown()
    report = {
        "benchmark": "patch_stream",
        "patch_px": config.patch_px,
        "batch_patches": config.batch_patches,
        "steps": arguments.steps,
        "step_ms": arguments.step_ms,
        "machine": machine.describe(),
        "sides": figures,
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


def measure(sides: dict[str, Epoch], arguments: argparse.Namespace) -> dict[str, Any]:
    """In each round every side delivers one epoch to every kind of consumer."""
    kinds = {"drain": 0.0, "train": arguments.step_ms / 1000}
    lead = arguments.lead_steps
    first = dict.fromkeys(sides, 0)
    seen: dict[tuple[str, str], list[dict[str, float]]] = {(side, kind): [] for side in sides for kind in kinds}
    for number in range(arguments.rounds + 1):
        for kind, seconds in kinds.items():
            for side, deliver in sides.items():
                deliver(range(first[side], first[side] + lead), 0.0)
                first[side] += lead + arguments.steps
                figures = deliver(range(first[side] - arguments.steps, first[side]), seconds)
                if number > 0:
                    seen[side, kind].append(figures)
    return compared(seen) | ({} if "webdataset" in sides else {"webdataset": "not installed"})


def compared(seen: dict[tuple[str, str], list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds, and the pace of the stream over that of each side in the same round."""
    figures: dict[str, Any] = {}
    for (side, kind), rounds in seen.items():
        ratios = [
            mine["patches_per_second"] / stream["patches_per_second"]
            for mine, stream in zip(seen["stream", kind], rounds, strict=True)
        ]
        figures.setdefault(side, {})[kind] = {
            "patches_per_second": statistics.median(each["patches_per_second"] for each in rounds),
            "waiting_share": statistics.median(each["waiting_share"] for each in rounds),
            "stream_over_this": statistics.median(ratios),
            "stream_over_this_rounds": ratios,
        }
    return figures


def streams(samples: list[Sample], image: ImageConfig, config: HgnConfig, every_step: int) -> dict[str, Epoch]:
    """The patch stream on a local Ray, read by two actors: opened for every step at once, and for each epoch."""
    cpus = machine.cores() + 1  # as `train` gives a local Ray, beside workers that take half a CPU each
    ray.init(address="local", _node_ip_address="127.0.0.1", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    limits = ray.data.ExecutionResources(object_store_memory=_AHEAD_BYTES)
    ray.data.DataContext.get_current().execution_options.resource_limits = limits
    photographs = prepare_photographs(samples, "1x", image)
    cuts = HgnCuts(ray.get(list(photographs.refs)), config, SEED)
    cutter, batch = HgnCutter(photographs, lambda: cuts, config.patch_px), config.batch_patches
    shares = [share(batch, number, WORKERS) for number in range(WORKERS)]

    def open_for(consumers: list[Any], steps: range) -> None:
        opened = open_streams(cutter, [Work(step) for step in steps], batch, WORKERS)
        ray.get([each.open.remote(*given) for each, *given in zip(consumers, opened, shares, strict=True)])

    def read(consumers: list[Any], began: float, count: int, seconds: float) -> dict[str, float]:
        return figures_of(count * batch, began, ray.get([each.take.remote(count, seconds) for each in consumers]))

    def each_epoch(steps: range, seconds: float) -> dict[str, float]:
        began = time.perf_counter()
        open_for(newly, steps)
        return read(newly, began, len(steps), seconds)

    def at_once(steps: range, seconds: float) -> dict[str, float]:
        return read(once, time.perf_counter(), len(steps), seconds)

    once, newly = ([ray.remote(Consumer).options(num_cpus=0.25).remote() for _ in range(WORKERS)] for _ in range(2))
    open_for(once, range(every_step))
    return {"stream": at_once, "stream opened each epoch": each_epoch}


class Consumer:
    """Stands for a Train worker."""

    def open(self, stream: Any, rows: range) -> None:
        """Begin to read a stream."""
        self.batches = (hgn_batch(columns["patch"], columns["lesion"], 1) for columns in read_stream(stream, rows))

    def take(self, count: int, seconds: float) -> tuple[float, float]:
        """Read some mini-batches of it; seconds waited and worked."""
        return consume(islice(self.batches, count), seconds)


if __name__ == "__main__":
    main()
