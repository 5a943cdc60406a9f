"""Score an archive, as a job of a cluster.

ray job submit -- python jobs/score_archive.py s3://archive/2026 s3://results/2026 --replicas 4
"""

from __future__ import annotations

import argparse
import logging
import sys

from ma_cluster.cluster.driver import Progress, score_archive
from ma_cluster.cluster.scoring_app import Fleet

log = logging.getLogger("score_archive")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="URL of the photographs: a path, file:// or s3://bucket/prefix")
    parser.add_argument("dest", help="URL of the run")
    parser.add_argument("--model", default="lite", help="a shipped model's name, or a bundle's folder")
    parser.add_argument("--replicas", type=int, help="of the networks; by default one for each core")
    parser.add_argument("--readers", type=int, default=1, help="replicas that fetch, decode and enhance")
    parser.add_argument("--gpus", type=float, default=0.0, help="for each replica of the networks; a share is allowed")
    parser.add_argument("--threads", type=int, default=1, help="of each replica of the networks")
    parser.add_argument("--address", default=None, help="a Ray cluster; by default the job's own, else a local one")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fleet = Fleet(
        segmenters=arguments.replicas,
        readers=arguments.readers,
        gpus_per_segmenter=arguments.gpus,
        threads_per_segmenter=arguments.threads,
        address=arguments.address,
    )
    summary = score_archive(arguments.source, arguments.dest, fleet, model=arguments.model, on_progress=log_progress)
    log.info("run %s: %s", summary.run, ", ".join(f"{count} {status}" for status, count in summary.statuses.items()))
    return 0 if summary.complete else 3


def log_progress(progress: Progress) -> None:
    rate, eta = progress.images_per_second, progress.eta_seconds
    pace = f", {rate:.2f} images/s, {eta:.0f} s to go" if rate and eta is not None else ""
    log.info("%d of %d%s", progress.done, progress.total, pace)


if __name__ == "__main__":
    sys.exit(main())
