"""The command line: each command parses, calls one function of the package, and writes lines.

Exit status: 0 all scored; 1 the run failed; 2 wrong usage; 3 finished, but some photographs were refused or failed;
130 on Ctrl-C; 143 on SIGTERM. torch and Ray are imported by the commands that need them.
"""

from ma_cluster.cli import evaluate, operation, patients, photographs, records, training
from ma_cluster.cli.app import main

__all__ = ["evaluate", "main", "operation", "patients", "photographs", "records", "training"]
