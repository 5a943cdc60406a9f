"""Train a hypothesis network, as a job of a cluster.

ray job submit -- python jobs/train_hgn.py --scale 1x --data s3://data/idrid --out s3://models/hgn_1x --workers 4
"""

from __future__ import annotations

import argparse
import logging
import sys

from ma_cluster.cluster.train_hgn import train_hgn
from ma_cluster.cluster.training import TrainRequest
from ma_cluster.config import RECIPES

log = logging.getLogger("train_hgn")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="URL of the data set: IDRiD's layout, or a manifest")
    parser.add_argument("--out", required=True, help="URL of the run: checkpoints and log")
    parser.add_argument("--scale", choices=("1x", "0.5x"), default="1x")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="paper")
    parser.add_argument("--healthy", help="URL of photographs without retinopathy")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--min-workers", type=int, help="go on with as few where nodes are lost")
    parser.add_argument("--gpus", type=float, default=0.0, help="for each worker")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--epoch-steps", type=int, help="between two checkpoints with validation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="take up the run at --out, where there is one")
    parser.add_argument("--address", help="a Ray cluster; by default the job's own, else a local one")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fewest = arguments.min_workers
    request = TrainRequest(
        network="hgn_1x" if arguments.scale == "1x" else "hgn_half",
        data=arguments.data,
        out=arguments.out,
        recipe=RECIPES[arguments.recipe](),
        healthy=arguments.healthy,
        workers=arguments.workers if fewest is None else (fewest, arguments.workers),
        gpus_per_worker=arguments.gpus,
        steps=arguments.steps,
        epoch_steps=arguments.epoch_steps,
        seed=arguments.seed,
        resume=arguments.resume,
        address=arguments.address,
    )
    done = train_hgn(request, on_progress=lambda progress: log.info("%s", progress))
    log.info("best checkpoint %s", done.best)
    return 0


if __name__ == "__main__":
    sys.exit(main())
