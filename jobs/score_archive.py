"""Score an archive, as a job of a cluster: `ma-cluster score` under another name.

ray job submit --working-dir . -- python jobs/score_archive.py s3://archive/2026 s3://results/2026 --replicas 4
"""

import sys

from ma_cluster.cli import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
