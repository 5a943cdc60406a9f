"""An archive run on spot nodes as discrete events: `simulate_fleet.py --out FILE.json [--check]`.

The shards, the workers and what each has in flight are the real ones (archive/plan.py, cluster/fleet), the seconds of
a stage those that `bench detect` measured. Nodes are taken away at random and come back, some are slow, the store
delivers so many bytes a second. A photograph whose node goes is tried again, and has failed the second time, as in
`ShardScorer`; a worker whose node goes begins its uncommitted shards anew. Not simulated: what Ray itself takes.

`ideal` is the time were all Segmenters busy with whole photographs to the end; `lost` is Segmenters' time that was
spent on what came to nothing, over all that was spent. --check lets a small run on a real Ray lose a worker, with
networks that sleep, and simulates the same.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from ma_cluster import machine
from ma_cluster.archive.plan import SHARDS_WANTED, Plan, cut, largest_shard
from ma_cluster.archive.shard_scorer import MAX_ATTEMPTS
from ma_cluster.cluster.fleet.replicas import Fleet
from ma_cluster.cluster.fleet.workers import workers_for

_DETECT = json.loads((Path(__file__).parent / "results/detect.json").read_text())["results"]["detect"][0]["seconds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A fleet, an archive, and what befalls them. Seconds, unless it says otherwise."""

    images: int = 40_000
    nodes: int = 50
    segmenters_per_node: int = 4
    read_s: float = _DETECT["prepare"]
    segment_s: float = sum(seconds for stage, seconds in _DETECT.items() if stage != "prepare")
    spread: float = 0.25
    """Standard deviation of the logarithm of what a photograph takes."""
    image_bytes: int = 2_500_000
    preempted_per_node_hour: float = 0.0
    away_s: float = 240.0
    """Until another node is there with its replicas."""
    noticed_s: float = 15.0
    """From a node's end to the errors of what it held."""
    slow_nodes: float = 0.0
    """The part of the nodes that take `slowness` times as long."""
    slowness: float = 3.0
    store_bytes_per_s: float = math.inf
    shard_images: int = 0
    """The most photographs of a shard; 0: what the planner says."""


@dataclass(eq=False, slots=True)
class Node:
    """What can be lost at once."""

    speed: float
    life: int = 0
    """How often it was lost."""
    running: dict[int, tuple[float, Callable[[], None]]] = field(default_factory=dict)
    """When each photograph on its Segmenters was begun, and what its loss means."""


@dataclass(eq=False, slots=True)
class Worker:
    """The process that has shards under way; it forgets them with its node."""

    node: Node
    life: int = 0
    shards: dict[int, int] = field(default_factory=dict)
    """Photographs that are undecided, by shard."""
    waiting: deque[tuple[int, int]] = field(default_factory=deque)
    """(shard, attempt) of photographs for which no thread was free."""
    busy: int = 0
    spent: dict[int, float] = field(default_factory=dict)
    """Segmenters' seconds on photographs of shards that are not committed."""


class Simulation:
    """One run of a scenario."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario, self.rng = scenario, random.Random(seed)
        self.now, self.lost_s, self.useful_s, self.failed, self.preemptions, self.again = 0.0, 0.0, 0.0, 0, 0, 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        slow = round(scenario.slow_nodes * scenario.nodes)
        self.nodes = [Node(scenario.slowness if n < slow else 1.0) for n in range(scenario.nodes)]
        self._free = deque((node, 0) for _ in range(scenario.segmenters_per_node) for node in self.nodes)
        self._asked: deque[tuple[Worker, int, int, int]] = deque()  # worker, its life, shard, attempt
        self._store_free = 0.0
        largest = scenario.shard_images or largest_shard(Plan(scenario.images, "", shards_wanted=SHARDS_WANTED))
        sizes = [round(scenario.image_bytes * self._varied()) for _ in range(scenario.images)]
        self._todo = [stop - start for start, stop in cut(sizes, largest)]
        self.left, self._next, self.first_commit_s = len(self._todo), iter(range(len(self._todo))), 0.0
        fleet = Fleet(segmenters=scenario.nodes * scenario.segmenters_per_node, readers=scenario.nodes)
        workers, self._in_flight = workers_for(len(self._todo), fleet)
        self.workers = [Worker(self.nodes[n % len(self.nodes)]) for n in range(workers)]
        self._at_a_time = 1 + -(-self._in_flight // largest)

    def run(self) -> Simulation:
        """To the last commit."""
        for _ in range(self._at_a_time):
            for worker in self.workers:
                self._give(worker)
        if self.scenario.preempted_per_node_hour:
            for node in self.nodes:
                self._plan_preemption(node)
        while self.left:
            self.now, _, happens = heapq.heappop(self._events)
            happens()
        return self

    def after(self, seconds: float, happens: Callable[[], None]) -> None:
        """Let something happen."""
        heapq.heappush(self._events, (self.now + seconds, next(self._order), happens))

    def lose_worker(self, worker: Worker) -> None:
        """Its process ends, and begins anew with the shards that it had."""
        worker.life += 1
        self.lost_s += sum(worker.spent.values())
        self.again += sum(self._todo[shard] - left for shard, left in worker.shards.items())
        worker.spent, worker.busy, shards = {}, 0, list(worker.shards)
        worker.waiting.clear()
        life = worker.life

        def restart() -> None:
            if worker.life == life:
                for shard in shards:
                    self._begin(worker, shard)

        worker.shards = {shard: self._todo[shard] for shard in shards}
        self.after(self.scenario.noticed_s, restart)

    def _plan_preemption(self, node: Node) -> None:
        self.after(self.rng.expovariate(self.scenario.preempted_per_node_hour / 3600), lambda: self._preempt(node))

    def _preempt(self, node: Node) -> None:
        self.preemptions += 1
        node.life += 1
        self._free = deque(slot for slot in self._free if slot[0] is not node)
        for began, lost in node.running.values():
            self.lost_s += self.now - began
            self.after(self.scenario.noticed_s, lost)
        node.running.clear()
        for worker in self.workers:
            if worker.node is node:
                worker.node = self.rng.choice([other for other in self.nodes if other is not node] or [node])
                self.lose_worker(worker)

        def back() -> None:
            self._free.extend([(node, node.life)] * self.scenario.segmenters_per_node)
            self._plan_preemption(node)
            self._match()

        self.after(self.scenario.away_s, back)

    def _give(self, worker: Worker) -> None:
        shard = next(self._next, None)
        if shard is not None:
            self._begin(worker, shard)

    def _begin(self, worker: Worker, shard: int) -> None:
        worker.shards[shard] = self._todo[shard]
        worker.waiting.extend([(shard, 1)] * self._todo[shard])
        self._fill(worker)

    def _fill(self, worker: Worker) -> None:
        while worker.waiting and worker.busy < self._in_flight:
            worker.busy += 1
            self._read(worker, *worker.waiting.popleft())

    def _read(self, worker: Worker, shard: int, attempt: int) -> None:
        size = self.scenario.image_bytes * self._varied()
        self._store_free = max(self.now, self._store_free) + size / self.scenario.store_bytes_per_s
        life = worker.life

        def ask() -> None:
            if worker.life == life:
                self._asked.append((worker, life, shard, attempt))
                self._match()

        self.after(self._store_free - self.now + self.scenario.read_s * self._varied(), ask)

    def _match(self) -> None:
        while self._free and self._asked:
            worker, life, shard, attempt = self._asked.popleft()
            if worker.life == life:
                self._segment(self._free.popleft(), worker, shard, attempt)

    def _segment(self, slot: tuple[Node, int], worker: Worker, shard: int, attempt: int) -> None:
        (node, node_life), life, began, number = slot, worker.life, self.now, next(self._order)
        node.running[number] = began, lambda: self._lost(worker, life, shard, attempt)

        def end() -> None:
            if node.life != node_life:
                return
            del node.running[number]
            self._free.append(slot)
            if worker.life == life:
                worker.spent[shard] = worker.spent.get(shard, 0.0) + self.now - began
                self._decided(worker, shard)
            else:
                self.lost_s += self.now - began
                self.again += 1
            self._match()

        self.after(self.scenario.segment_s * self._varied() * node.speed, end)

    def _lost(self, worker: Worker, life: int, shard: int, attempt: int) -> None:
        if worker.life != life:
            return
        if attempt < MAX_ATTEMPTS:
            self._read(worker, shard, attempt + 1)
        else:
            self.failed += 1
            self._decided(worker, shard)

    def _decided(self, worker: Worker, shard: int) -> None:
        worker.busy -= 1
        worker.shards[shard] -= 1
        if not worker.shards[shard]:
            del worker.shards[shard]
            self.useful_s += worker.spent.pop(shard, 0.0)
            self.left -= 1
            self.first_commit_s = self.first_commit_s or self.now
            self._give(worker)
        self._fill(worker)

    def _varied(self) -> float:
        return self.rng.lognormvariate(-(self.scenario.spread**2) / 2, self.scenario.spread)


SCENARIOS: dict[str, dict[str, float]] = {
    "nothing befalls it": {},
    "one node in ten is lost an hour": {"preempted_per_node_hour": 0.1},
    "each node is lost every two hours": {"preempted_per_node_hour": 0.5},
    "each node is lost every hour": {"preempted_per_node_hour": 1.0},
    "each node is lost every two hours, shards of 256": {"preempted_per_node_hour": 0.5, "shard_images": 256},
    "one node in twenty is three times as slow": {"slow_nodes": 0.05},
    "the store gives what 0.8 of the Segmenters take": {"store_bytes_per_s": -0.8},
    "all of it": {"preempted_per_node_hour": 0.5, "slow_nodes": 0.05, "store_bytes_per_s": -0.8},
}
"""A negative rate of the store is a part of what the Segmenters take."""


def main() -> None:
    """Simulate each scenario with some seeds, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=Scenario().images)
    parser.add_argument("--check", action="store_true", help="beside a small run on a real Ray that loses a worker")
    given = parser.parse_args()
    rows = [row(name, changes, given.images, given.seeds) for name, changes in SCENARIOS.items()]
    report: dict[str, Any] = {"benchmark": "fleet_simulation", "machine": machine.describe()}
    report |= {"seeds": given.seeds, "defaults": _plain(Scenario(images=given.images)), "scenarios": rows}
    report |= {"check": check(given.seeds)} if given.check else {}
    given.out.write_text(json.dumps(report, indent=2) + "\n")


def row(name: str, changes: dict[str, Any], images: int, seeds: int) -> dict[str, Any]:
    """Means over the seeds."""
    scenario = replace(Scenario(images=images), **changes)
    segmenters = scenario.nodes * scenario.segmenters_per_node
    if scenario.store_bytes_per_s < 0:
        taken = segmenters / scenario.segment_s * scenario.image_bytes
        scenario = replace(scenario, store_bytes_per_s=-scenario.store_bytes_per_s * taken)
    runs = [Simulation(scenario, seed).run() for seed in range(seeds)]
    ideal = images * scenario.segment_s / segmenters
    return {
        "scenario": name,
        "changes": {key: getattr(scenario, key) for key in changes},
        "ideal_s": ideal,
        "seconds": statistics.mean(run.now for run in runs),
        "ideal_over_seconds": [round(ideal / run.now, 3) for run in sorted(runs, key=lambda run: -run.now)],
        "lost": [
            round(run.lost_s / (run.lost_s + run.useful_s), 4) for run in sorted(runs, key=lambda run: run.lost_s)
        ],
        "preemptions": statistics.mean(run.preemptions for run in runs),
        "failed_per_million": statistics.mean(run.failed for run in runs) / images * 1e6,
    }


def check(seeds: int) -> dict[str, Any]:
    """A run on a real Ray, whole, and again with a worker killed half way, beside the same in simulation."""
    import bench_rate

    images, shards, network_s = 1536, 64, 0.15
    scenario = Scenario(images=images, nodes=1, segmenters_per_node=4, read_s=0.0, segment_s=network_s, spread=0.0)
    scenario = replace(scenario, shard_images=images // shards)
    whole = Simulation(scenario, 0).run()
    measured = bench_rate.lose_a_worker(images, round(1000 * network_s), shards)
    up_s = measured["whole"]["first_commit_s"] - whole.first_commit_s
    slower = (measured["whole"]["seconds"] - up_s) / whole.now  # Serve, and what else the machine does
    scenario = replace(scenario, segment_s=network_s * slower, noticed_s=up_s)
    whole_s = Simulation(scenario, 0).run().now

    def killed(seed: int) -> Simulation:
        run = Simulation(scenario, seed)
        moment = (measured["killed"]["killed_s"] - up_s) * run.rng.uniform(0.9, 1.1)
        run.after(moment, lambda: run.lose_worker(run.rng.choice(run.workers)))
        return run.run()

    runs = [killed(seed) for seed in range(4 * seeds)]
    more, again = [run.now - whole_s for run in runs], [run.again for run in runs]
    return measured | {
        "measured_more_s": measured["killed"]["seconds"] - measured["whole"]["seconds"],
        "simulated": {
            "slower": slower,
            "more_s": {"least": min(more), "mean": statistics.mean(more), "most": max(more)},
            "again": {"least": min(again), "mean": statistics.mean(again), "most": max(again)},
        },
    }


def _plain(scenario: Scenario) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in asdict(scenario).items()}


if __name__ == "__main__":
    main()
