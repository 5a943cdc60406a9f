r"""Train the refinement network, as a job of a cluster: `ma-cluster train prn` under another name.

ray job submit --working-dir . -- \
    python jobs/train_prn.py --data s3://data/idrid --out s3://models/prn --workers 4 --gpus 1 --recipe paper
"""

import sys

from ma_cluster.cli import main

if __name__ == "__main__":
    main(["train", "prn", *sys.argv[1:]])
