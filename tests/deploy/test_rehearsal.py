"""The rehearsal of a deployment on one machine, with networks that answer at once."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from processes import processes

SCRIPT = Path(__file__).parents[2] / "deploy" / "local" / "rehearse.sh"


@pytest.mark.long
def test_a_job_is_submitted_between_two_nodes_a_store_and_prometheus_and_nothing_is_left(tiny_bundle: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ma-") as folder:  # short, as Ray makes the paths of sockets from it
        environment = os.environ | {"MODEL": str(tiny_bundle), "PHOTOGRAPHS": "2", "TMPDIR": folder}
        done = subprocess.run([SCRIPT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        assert "2 of 2 photographs decided" in done.stdout
        assert "exporters that Prometheus reads: " in done.stdout or "no Prometheus on the PATH" in done.stdout
        assert [process.title for process in processes() if folder in process.title] == []
        assert list(Path(folder).iterdir()) == []
