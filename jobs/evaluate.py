r"""Evaluate a model on annotated photographs, as a job of a cluster: `ma-cluster evaluate` under another name.

ray job submit --working-dir . -- \
    python jobs/evaluate.py --data s3://data/idrid --split test --out s3://results/table_2 --model lite
"""

import sys

from ma_cluster.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
