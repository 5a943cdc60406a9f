"""Archive runs as tests look at them: outcomes by key, and the fleet's processes."""

from __future__ import annotations

import os
from typing import Any

from processes import Process, descendants

from ma_cluster.cluster.outcomes import SCHEMA
from ma_cluster.cluster.retry import latest_outcomes
from ma_cluster.images.store import Store


def rows(dest: Store) -> dict[str, dict[str, Any]]:
    """The latest outcomes by key; a key that is there twice fails."""
    listed = [row for table in latest_outcomes(dest, SCHEMA.names) for row in table.to_pylist()]
    by_key = {row["key"]: row for row in listed}
    assert len(by_key) == len(listed)
    return by_key


def replicas(kind: str = "") -> list[Process]:
    """Processes of the fleet on this test run's own Ray, which names them after the deployment."""
    own = descendants(os.getpid())
    prefix = "ray::ServeReplica:ma-cluster-"
    return [process for process in own if process.title.startswith(prefix) and kind in process.title]
