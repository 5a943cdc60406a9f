"""An evaluation on Ray: a task looks at one photograph, the driver adds up what they find.

samples of a split -> [read -> networks, each once -> counts of every row] -> Tally
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from ma_cluster.bundle import DETECTING, Bundle
from ma_cluster.cluster.connection import answer, check_gpus, connected
from ma_cluster.config import SplitConfig
from ma_cluster.errors import ImageError, MaClusterError, UsageError
from ma_cluster.evaluation.image_figures import GradedAnswer, answer_photograph
from ma_cluster.evaluation.tally import DETECT, ROWS, Tally, evaluate_photograph, network_of, rows_given
from ma_cluster.images.datasets import (
    Graded,
    Sample,
    Split,
    of_no_use,
    read_dataset,
    read_graded,
    read_healthy,
    read_split,
)

if TYPE_CHECKING:
    from ma_cluster.lesions.detector import Detector

OnProgress = Callable[[int, int], None]
_RETRIES = 2  # of a task whose worker or node was lost; a photograph that is of no use is not tried again


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRequest:
    """What is to be evaluated on what, with how much."""

    data: str | None
    """URL of the data set: IDRiD's layout, or a manifest."""
    split: Split
    rows: tuple[str, ...] | None = None
    """Names of the rows; None for all that the model gives."""
    healthy: str | None = None
    """URL of photographs without lesions, a folder or a table of grades, on which lesions are only counted. For the
    validation split those that the recipe names, for the test split all."""
    grades: str | None = None
    """URL of a table of photographs and grades; see `read_graded`. For the validation split those that validate, for
    the test split all."""
    gpus: float = 0.0
    """For each photograph under way, a share allowed; 0 runs the networks on the CPU."""
    address: str | None = None
    """Of a Ray cluster; None for the one that is up in this process, else RAY_ADDRESS's, else a local one."""


def evaluate(bundle: Bundle, request: EvaluationRequest, on_progress: OnProgress | None = None) -> Tally:
    """Look at each photograph of a split once. What is found does not depend on the workers or their number.

    Args:
        bundle: the model; it goes to the workers through the object store.
        request: what is to be evaluated.
        on_progress: told how many photographs are done, of how many.

    Raises:
        UsageError: no such row, no photograph, or one that cannot be used; or this machine lacks the GPUs where no
            cluster is given.
        StoreError: a photograph or mask cannot be read.
        MaClusterError: workers died too often.
    """
    check_gpus(request.address, request.gpus)
    rows = chosen_rows(bundle, request.rows)
    jobs = _jobs(request, bundle.recipe.split, rows)
    needed = {*DETECTING, *(network_of(row) for row in rows if row != DETECT)}
    return sum(_looked_at(_only(bundle, needed), jobs, request, on_progress), Tally())


def evaluate_grades(
    bundle: Bundle, request: EvaluationRequest, on_progress: OnProgress | None = None
) -> list[GradedAnswer]:
    """What the model says of each graded photograph as a whole, in the table's order.

    Args:
        bundle: the model, which must have a grading.
        request: `grades` is evaluated; rows without a photograph of their own are those of `data`, where it is given.
        on_progress: told how many photographs are done, of how many.

    Raises:
        UsageError: the model has no grading, or there is no photograph; or this machine lacks the GPUs where no cluster
            is given.
        StoreError: a photograph cannot be read.
        MaClusterError: workers died too often.
    """
    check_gpus(request.address, request.gpus)
    if not bundle.recipe.grading.features:
        raise UsageError("the model gives no image score to compare with grades; pack one with `bundle --grades`")
    assert request.grades is not None
    split = bundle.recipe.split
    annotated = [] if request.data is None else read_dataset(request.data, split)
    graded = read_graded(request.grades, split, annotated)
    if request.split == "validation":
        graded = [each for each in graded if each.split == "validation"]
    if not graded:
        raise UsageError("no graded photographs validate: name them in a column split, or take all with --split test")
    jobs = [_GradedJob(number, each) for number, each in enumerate(graded, 1)]
    found = dict(_looked_at(_only(bundle, DETECTING), jobs, request, on_progress))
    return [found[job.number] for job in jobs]


def _only(bundle: Bundle, networks: Collection[str]) -> Bundle:
    """The bundle with some networks."""
    weights = {name: values for name, values in bundle.weights.items() if name in networks}
    return dataclasses.replace(bundle, weights=weights)


def _looked_at(
    bundle: Bundle,
    jobs: Sequence[_Job] | Sequence[_GradedJob],
    request: EvaluationRequest,
    on_progress: OnProgress | None,
) -> Iterator[Any]:
    """What each job gives, as they come."""
    with connected(request.address, waiting_cpus=0):
        # in a tuple, so that Ray hands on the reference itself: workers load a model once, not for each photograph
        model = (ray.put(bundle),)
        task: Any = ray.remote(_look).options(num_cpus=1, num_gpus=request.gpus, max_retries=_RETRIES)
        pending = {task.remote(model, job, request.gpus > 0): job.number for job in jobs}
        while pending:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            yield _result(done, pending.pop(done), len(jobs))
            if on_progress is not None:
                on_progress(len(jobs) - len(pending), len(jobs))


def chosen_rows(bundle: Bundle, wanted: Sequence[str] | None) -> list[str]:
    """The rows that are counted: those of the paper, in its order, and what `detect` does.

    Raises:
        UsageError: there is no row of a name, or the model has not the network for it.
    """
    given = [*rows_given(bundle.weights), DETECT]
    if wanted is None:
        return given
    known = [*ROWS, DETECT]
    unknown, missing = set(wanted) - set(known), set(wanted) - set(given)
    if unknown or not wanted:
        raise UsageError(f"no row named {', '.join(sorted(unknown)) or 'nothing'}; there are all, {', '.join(known)}")
    if missing:
        raise UsageError(
            f"the model has no network for {', '.join(sorted(missing))}; `ma-cluster bundle` packs one (--prn, --cls)"
        )
    return [row for row in given if row in wanted]


@dataclass(frozen=True, slots=True)
class _Job:
    number: int
    sample: Sample
    rows: tuple[str, ...]

    def look(self, detector: Detector) -> Tally:
        return evaluate_photograph(detector, self.sample, self.number, self.rows)


@dataclass(frozen=True, slots=True)
class _GradedJob:
    number: int
    graded: Graded

    def look(self, detector: Detector) -> tuple[int, GradedAnswer]:
        return self.number, answer_photograph(detector, self.graded)


def _jobs(request: EvaluationRequest, split: SplitConfig, rows: Sequence[str]) -> list[_Job]:
    """Photographs whose microaneurysms are all known, then the healthy ones."""
    assert request.data is not None
    known = read_split(request.data, split, request.split)
    healthy = [] if request.healthy is None else read_healthy(request.healthy, split)
    if request.split == "validation":
        healthy = [sample for sample in healthy if sample.split == "validation"]
    if request.healthy is not None and not healthy:
        raise UsageError("there are no healthy photographs of this split; the recipe names those that validate")
    pooled = [_Job(number, sample, tuple(rows)) for number, sample in enumerate(known, 1)]
    return [*pooled, *(_Job(number, sample, ()) for number, sample in enumerate(healthy, len(pooled) + 1))]


def _look(model: tuple[ray.ObjectRef[Bundle]], job: _Job | _GradedJob, cuda: bool) -> Any:
    return job.look(_detector(model[0], cuda))


@lru_cache(maxsize=1)
def _detector(bundle: ray.ObjectRef[Bundle], cuda: bool) -> Any:
    """The worker's model."""
    from ma_cluster.lesions.detector import Detector

    return Detector(ray.get(bundle), device="cuda" if cuda else "cpu", threads=1)


def _result(done: ray.ObjectRef[Any], number: int, total: int) -> Any:
    """What was found on a photograph; names it by its number, as a file's name may be a patient's."""
    try:
        found = answer(done)
    except (ImageError, UsageError) as error:
        raise of_no_use(number, total, error) from None
    except MaClusterError as error:
        raise type(error)(f"photograph {number} of {total} in the order of their names: {error}") from None
    except RayError as error:
        text = f"the worker that looked at photograph {number} of {total} died ({type(error).__name__}): {error}"
        raise MaClusterError(text) from error
    return found
