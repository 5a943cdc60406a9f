"""Runs benchmarks by name, each in a fresh process, so that memory and caches are its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

from ma_cluster.errors import UsageError
from ma_cluster.report.bench import peers, stages
from ma_cluster.report.bench.halo import halo
from ma_cluster.report.bench.machine import describe_machine
from ma_cluster.report.bench.score import score
from ma_cluster.report.bench.subject import Subject

Rows = list[dict[str, Any]]
BENCHMARKS: dict[str, Callable[[Subject], Iterator[dict[str, Any]]]] = {
    "detect": stages.detect,
    "monai": peers.monai,
    "engine": peers.engine,
    "halo": halo,
    "dense": peers.dense,
    "growth": stages.growth,
    "score": score,
}


def run_benchmarks(
    names: Sequence[str], subject: Subject, on_rows: Callable[[str, Rows | str], None]
) -> dict[str, Any]:
    """Run them in turn and return the report, ready for JSON.

    Args:
        names: of benchmarks; none means all.
        subject: what they look at.
        on_rows: is given each benchmark's rows, or why it cannot run, as soon as that is known.

    Raises:
        UsageError: a name is unknown.
    """
    unknown = sorted(set(names) - BENCHMARKS.keys())
    if unknown:
        raise UsageError(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    subject.bundle()  # a model that cannot be loaded is told before anything is measured
    results: dict[str, Rows | str] = {}
    for name in names or BENCHMARKS:
        results[name] = _alone(name, subject)
        on_rows(name, results[name])
    settings = asdict(subject) | {"image": None if subject.image is None else subject.image.name}
    return {"machine": describe_machine(subject.device), "settings": settings, "results": results}


def _alone(name: str, subject: Subject) -> Rows | str:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_rows, name, subject).result()
        except UsageError as error:
            return f"skipped: {error}"


def _rows(name: str, subject: Subject) -> Rows:
    return list(BENCHMARKS[name](subject))
