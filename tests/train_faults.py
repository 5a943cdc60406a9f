"""What befalls a training run in tests."""

from __future__ import annotations

import os

from processes import Process, descendants, kill

from ma_cluster.training.loop import Progress


class Killer:
    """Kills one Train worker when told of the epoch that ends at `step`, while the next one is under way."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.victims: list[Process] = []

    def __call__(self, progress: Progress) -> None:
        if progress.epoch is not None and progress.step == self.step and not self.victims:
            self.victims = [process for process in descendants(os.getpid()) if "RayTrainWorker" in process.title][-1:]
            kill(self.victims)
