"""Every error this package raises on purpose, and the closed lists of what can be said of an image.

    MaClusterError
    |-- UsageError            a setting or argument is wrong                       exit code 2
    |-- RunConflictError      DEST holds a run of another model, config or source  exit code 2
    |-- BundleError           a model is damaged, foreign or not what it says      exit code 2
    |-- LedgerLostError       losses of the healthy pool are gone and cannot be brought back
    |-- ClusterError          no Ray cluster answers at an address, or it refuses
    |-- SandboxError          the processes that decode do not start
    |-- FleetBrokenError      the fleet, or its source, fails whatever is asked of it
    |-- StoreError            the object store did not do what was asked
    |   |-- PartDamagedError      a part of a run is damaged, foreign or missing; names it
    |   |-- ObjectMissingError    no such key
    |   |-- ObjectChangedError    the object is not the one that was planned (ETag)
    |   `-- ObjectRefusedError    the server does not take this object; it may take others
    `-- ImageError            one photograph has no result; carries a Reason
        |-- ImageRefusedError     its content is the cause
        `-- ImageFailedError      we or the store are the cause
            |-- WorkerLostError       what held it died or was stuck: of it, or of something else
            `-- SourceLostError       its source does not even say whether it is there

Messages name the thing, the cause and the cure. They never hold a key, a file name or metadata of a patient:
whoever raises does not know them, whoever reports may add them.
"""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """What became of one image of an archive."""

    SCORED = "scored"
    REFUSED = "refused"
    FAILED = "failed"


class Reason(StrEnum):
    """Why an image has no result. Closed: a new reason is added here and nowhere else."""

    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED = "unsupported"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_LARGE = "too_large"
    TOO_SMALL = "too_small"
    NO_FOV = "no_fov"
    MISSING = "missing"  # a listed key that never existed: failed, as a retry finds it once it is there
    CHANGED = "changed"
    CRASHED_WORKER = "crashed_worker"
    TIMEOUT = "timeout"
    STORE_ERROR = "store_error"
    NOT_FINITE = "not_finite"

    @property
    def status(self) -> Status:
        """`refused` where the photograph's content is the cause, `failed` where we or the store are."""
        return Status.FAILED if self in _FAILURES else Status.REFUSED


_FAILURES = frozenset(
    {
        Reason.MISSING,
        Reason.CHANGED,
        Reason.CRASHED_WORKER,
        Reason.TIMEOUT,
        Reason.STORE_ERROR,
        Reason.NOT_FINITE,
    }
)


class Flag(StrEnum):
    """What a person should know of a photograph that has a result. Closed, too."""

    DARK = "dark"
    BRIGHT = "bright"
    HAZY = "hazy"
    BLURRED = "blurred"
    COARSE = "coarse"
    FIELD_ASSUMED = "field_assumed"
    MORE_PAGES = "more_pages"
    MORE_DISCS = "more_discs"
    RED_FREE = "red_free"
    BURNT_IN_TEXT = "burnt_in_text"


class Triage(StrEnum):
    """What is to be done with a photograph that has a result. Closed, too; see lesions/findings.py."""

    NONE = "none"
    REFER = "refer"
    UNGRADABLE = "ungradable"


class RequestFault(StrEnum):
    """Why the HTTP service has no answer, where it is not a photograph's `Reason`. Closed, too."""

    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    INVALID = "invalid"
    BUSY = "busy"
    UNAVAILABLE = "unavailable"


class MaClusterError(Exception):
    """Base of every error raised on purpose."""


class UsageError(MaClusterError):
    """A setting or an argument is wrong."""


class RunConflictError(MaClusterError):
    """The destination already holds a run of another model, configuration, source or salt."""


class BundleError(MaClusterError):
    """A model bundle is damaged, foreign, or not what its manifest says."""


class LedgerLostError(MaClusterError):
    """Losses of the healthy pool are gone, or their snapshot is not what it should be."""


class ClusterError(MaClusterError):
    """No Ray cluster answers at the address that was given, or it does not take this process."""


class SandboxError(MaClusterError):
    """The processes that decode photographs do not start, or find no decoder."""


class FleetBrokenError(MaClusterError):
    """The scoring fleet does not start, or it or the source fails on one photograph after the other: they are not to
    blame.
    """


class StoreError(MaClusterError):
    """The object store did not do what was asked, after retries."""


class PartDamagedError(StoreError):
    """A part of a run is damaged, foreign or missing. `part` is its key, below the destination."""

    def __init__(self, part: str, fault: str) -> None:
        super().__init__(part, fault)
        self.part = part
        self.fault = fault

    def __str__(self) -> str:
        cure = "`ma-cluster score SOURCE DEST --repair` puts it aside, and goes on with what is whole"
        return f"{self.part} of the destination: {self.fault}; {cure}"


class ObjectMissingError(StoreError):
    """There is no object under the key."""


class ObjectChangedError(StoreError):
    """The object under the key is not the one that was planned."""


class ObjectRefusedError(StoreError):
    """The server does not take this object, however often it is sent; it may take others."""


class ImageError(MaClusterError):
    """One photograph has no result. `reason` is from the closed list, `detail` says more for a person."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class ImageRefusedError(ImageError):
    """The photograph's own content is the cause."""


class ImageFailedError(ImageError):
    """We or the store are the cause; scoring it again later may succeed."""


class WorkerLostError(ImageFailedError):
    """What held the photograph died, broke or was stuck, be it of this photograph or of something else."""


class SourceLostError(ImageFailedError):
    """The photograph's source neither gives it nor tells of it: it is away, or lets nobody in."""
