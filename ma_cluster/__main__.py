"""`python -m ma_cluster` is `ma-cluster`."""

from ma_cluster.cli import main

if __name__ == "__main__":
    main()
