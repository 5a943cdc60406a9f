r"""Train a hypothesis network, as a job of a cluster: `ma-cluster train hgn` under another name.

ray job submit --working-dir . -- \
    python jobs/train_hgn.py --recipe paper --scale 1x \
    --data s3://data/idrid --out s3://models/hgn_1x --workers 4 --gpus 1
"""

import sys

from ma_cluster.cli import main

if __name__ == "__main__":
    main(["train", "hgn", *sys.argv[1:]])
