"""Train the refinement network, as a job of a cluster.

ray job submit -- python jobs/train_prn.py --data s3://data/idrid --out s3://models/prn --workers 4
"""

from __future__ import annotations

import argparse
import logging
import sys

from ma_cluster.cluster.train_prn import train_prn
from ma_cluster.cluster.training import TrainRequest
from ma_cluster.config import RECIPES

log = logging.getLogger("train_prn")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="URL of the data set: IDRiD's layout, or a manifest")
    parser.add_argument("--out", required=True, help="URL of the run: checkpoints and log")
    parser.add_argument("--no-triplet", action="store_true", help="the ablation `cls`: classification alone")
    parser.add_argument("--uniform", action="store_true", help="draw negatives uniformly, not by their loss")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="paper")
    parser.add_argument("--healthy", help="URL of photographs without retinopathy")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--min-workers", type=int, help="go on with as few where nodes are lost")
    parser.add_argument("--gpus", type=float, default=0.0, help="for each worker")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--epoch-steps", type=int, help="between two checkpoints, refreshes and draws")
    parser.add_argument("--ledger-shards", type=int, default=1, help="actors that hold the healthy pool's losses")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="take up the run at --out, where there is one")
    parser.add_argument("--address", help="a Ray cluster; by default the job's own, else a local one")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fewest = arguments.min_workers
    request = TrainRequest(
        network="cls" if arguments.no_triplet else "prn",
        data=arguments.data,
        out=arguments.out,
        recipe=RECIPES[arguments.recipe](),
        healthy=arguments.healthy,
        workers=arguments.workers if fewest is None else (fewest, arguments.workers),
        gpus_per_worker=arguments.gpus,
        steps=arguments.steps,
        epoch_steps=arguments.epoch_steps,
        selective=not arguments.uniform,
        ledger_shards=arguments.ledger_shards,
        seed=arguments.seed,
        resume=arguments.resume,
        address=arguments.address,
    )
    done = train_prn(request, on_progress=lambda progress: log.info("%s", progress))
    log.info("best checkpoint %s", done.best)
    return 0


if __name__ == "__main__":
    sys.exit(main())
