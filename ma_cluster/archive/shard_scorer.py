"""A shard of the plan -> its committed part: the worker of an archive run. Plain Python; the fleet is passed in.

`Breaker` stands between a worker and the fleet, and tells a broken fleet, or a source that is away, from bad
photographs: loss after loss with no success in between is no photograph's fault.
"""

from __future__ import annotations

import hashlib
import logging
import time
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ma_cluster.archive.audit import write_audit
from ma_cluster.archive.outcomes import Outcome, artefact_name, identify
from ma_cluster.archive.plan import Shard, read_shard
from ma_cluster.archive.run import Run, commit, is_committed
from ma_cluster.errors import Flag, FleetBrokenError, ImageError, Reason, SourceLostError, WorkerLostError
from ma_cluster.images.reading import Facts
from ma_cluster.lesions.findings import Findings
from ma_cluster.storage.identity import Pseudonyms
from ma_cluster.storage.store import Entry, Store

log = logging.getLogger(__name__)
MAX_ATTEMPTS = 2
"""A photograph is tried again once where the cause may have been another's."""
_WORTH_RETRYING = frozenset({Reason.CRASHED_WORKER, Reason.TIMEOUT, Reason.STORE_ERROR})


@dataclass(frozen=True, slots=True)
class Reading:
    """A photograph that was read; its pixels stay in the fleet."""

    facts: Facts
    prepared: Any
    """What the fleet knows them by."""


@dataclass(frozen=True, slots=True)
class Segmentation:
    """What a Segmenter answers: findings, and the files that people look at, encoded."""

    findings: Findings
    mask_png: bytes
    overlay_jpeg: bytes
    seconds: dict[str, float]
    """Wall time of the stages hgn, prn and lesions; encoding counts as lesions."""


@runtime_checkable
class Recorder(Protocol):
    """Hears of each photograph; `cluster.recording.Recorder` is one."""

    def begun(self) -> None:
        """A photograph is under way."""

    def decided(self, outcome: Outcome) -> None:
        """It has its outcome."""


@runtime_checkable
class Scorer(Protocol):
    """What a fleet does; `ScoringApp` is one."""

    def read(self, entry: Entry) -> Reading:
        """Fetch, decode and enhance; raises ImageError."""

    def segment(self, reading: Reading) -> Segmentation:
        """Networks and lesion table; raises ImageError."""


@dataclass(frozen=True, slots=True)
class ShardScorer:
    """Scores shards of a run, several at a time if asked from several threads."""

    scorer: Scorer
    dest: Store
    """Of plan and outcomes."""
    artefacts: Store
    """Of masks and overlays: the same, but for a retry, whose lie beside those of the run."""
    run: Run
    threads: Executor
    """As many as photographs may be in flight, of all shards together: the end of one leaves no thread idle."""
    recorder: Recorder
    pseudonyms: Pseudonyms | None = None
    """What patients are called whom DICOM files name; without them nobody is named."""
    dicom: bool = False
    """Write the results of DICOM photographs as DICOM, too."""

    def score(self, shard: Shard) -> int:
        """Score a shard, write its masks and overlays, commit and audit it, and return the number of its photographs.

        One that another driver has committed meanwhile is left as it is.

        Raises:
            StoreError: the destination cannot be written; the shard stays uncommitted.
            FleetBrokenError: the fleet or the source fails whatever is asked of it; the shard stays uncommitted.
        """
        if is_committed(self.dest, shard):
            return shard.images
        entries = read_shard(self.dest, shard)
        outcomes = list(self.threads.map(self.decide, entries))
        commit(self.dest, self.run, shard, outcomes)
        write_audit(self.dest, self.run, shard.number)
        return len(outcomes)

    def decide(self, entry: Entry) -> Outcome:
        """One photograph to its outcome, tried at most twice."""
        self.recorder.begun()
        outcome = self._attempt(entry, 1)
        for attempt in range(2, MAX_ATTEMPTS + 1):
            if outcome.reason not in _WORTH_RETRYING:
                break
            log.warning("a photograph is tried again: %s, %s", outcome.reason, outcome.detail)
            outcome = self._attempt(entry, attempt)
        self.recorder.decided(outcome)
        return outcome

    def _attempt(self, entry: Entry, attempt: int) -> Outcome:
        reading = None
        try:
            reading = self.scorer.read(entry)
            segmentation = self.scorer.segment(reading)
        except ImageError as error:
            facts = None if reading is None else reading.facts
            return Outcome(
                key=entry.key,
                etag=entry.etag,
                reason=error.reason,
                detail=error.detail,
                attempts=attempt,
                identity=identify(entry, facts, self.pseudonyms),
                facts=facts,
            )
        began = time.perf_counter()
        files = self._write(entry, reading.facts, segmentation)
        write = {"write": time.perf_counter() - began}
        return Outcome(
            key=entry.key,
            etag=entry.etag,
            reason=None,
            detail=reading.facts.quality.detail,
            attempts=attempt,
            identity=identify(entry, reading.facts, self.pseudonyms),
            facts=reading.facts,
            findings=segmentation.findings,
            **files,
            seconds=reading.facts.seconds | segmentation.seconds | write,
        )

    def _write(self, entry: Entry, facts: Facts, segmentation: Segmentation) -> dict[str, str]:
        """Write mask and overlay, and DICOM where it is wanted, unless a run that was cut short has: the same name
        means the same result. Returns what the outcome says of them.
        """
        name = artefact_name(entry, self.run.model_digest, self.run.config_digest)
        mask_key, overlay_key = f"masks/{name}.png", f"overlays/{name}.jpg"
        stored = segmentation.mask_png
        if not self.artefacts.create(mask_key, stored):
            stored = self.artefacts.get(mask_key)
        self.artefacts.create(overlay_key, segmentation.overlay_jpeg)
        if self.dicom and facts.acquisition is not None:
            from ma_cluster.archive.dicom_export import write_dicom  # highdicom takes a second
            from ma_cluster.archive.dicom_results import Told

            findings = segmentation.findings
            told = Told(
                mask_png=segmentation.mask_png,
                overlay_jpeg=segmentation.overlay_jpeg,
                lesions=len(findings.lesions),
                area_px=sum(lesion.area_px for lesion in findings.lesions),
                image_score=findings.image_score,
                triage=findings.triage.value,
                gradable=facts.quality.gradable,
                shows_text=Flag.BURNT_IN_TEXT in facts.quality.flags,
            )
            write_dicom(self.artefacts, name, facts.acquisition, told, self.run)
        digest = hashlib.sha256(stored).hexdigest()
        return {"mask_key": mask_key, "mask_sha256": digest, "overlay_key": overlay_key}


class Breaker:
    """A `Scorer` that gives up after it has lost a worker or the source `limit` times in a row; a segmented photograph
    starts the count anew.

    A decoder's death in its child process does not count, nor a photograph that its source tells of and does not give:
    these are known to be the photograph's own. Threads may share it.
    """

    def __init__(self, scorer: Scorer, count: Count, limit: int) -> None:
        self._scorer, self._count, self._limit = scorer, count, limit
        self._fault: str | None = None

    def read(self, entry: Entry) -> Reading:
        """As the scorer does.

        Raises:
            FleetBrokenError: too much was lost in a row, by this photograph or before.
        """
        self._check()
        try:
            return self._scorer.read(entry)
        except (WorkerLostError, SourceLostError) as lost:
            self._note(lost)
            raise

    def segment(self, reading: Reading) -> Segmentation:
        """As the scorer does.

        Raises:
            FleetBrokenError: too much was lost in a row, by this photograph or before.
        """
        self._check()
        try:
            segmentation = self._scorer.segment(reading)
        except WorkerLostError as lost:
            self._note(lost)
            raise
        self._count.won()
        return segmentation

    def _note(self, lost: WorkerLostError | SourceLostError) -> None:
        if (in_a_row := self._count.lost()) >= self._limit:
            if isinstance(lost, SourceLostError):
                fault = f"the source of the photographs failed {in_a_row} times in a row, the last time: {lost.detail}"
                cure = "renew its credentials on all workers, or bring it back"
            else:
                fault = f"{in_a_row} workers were lost in a row, the last as {lost.detail}"
                cure = "see the replicas' logs, look at memory and model"
            again = "and give the command again, with --retry-failed"
            self._fault = f"{fault}; no photograph is the cause of that: {cure}, {again}"
            self._check()

    def _check(self) -> None:
        if self._fault is not None:
            raise FleetBrokenError(self._fault)


@runtime_checkable
class Count(Protocol):
    """Losses, of a worker or the source, since the last success."""

    def lost(self) -> int:
        """One more; returns how many in a row."""

    def won(self) -> None:
        """None any more."""


class PlainCount:
    """A `Count` in this process, for one thread."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def lost(self) -> int:
        self._in_a_row += 1
        return self._in_a_row

    def won(self) -> None:
        self._in_a_row = 0
