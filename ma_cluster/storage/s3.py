"""A prefix of an S3 bucket as a `Store`, over a network and a server that may break at any byte.

botocore tries a request again until its headers are there, but not where the body breaks off, and keeps the count to
itself. So it tries once, and what may pass is tried again here, bodies included.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    ConnectTimeoutError,
    EndpointConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
)
from urllib3.exceptions import HTTPError

from ma_cluster.errors import ObjectChangedError, ObjectMissingError, StoreError, UsageError
from ma_cluster.storage.store import Entry, check_size

_Answer = TypeVar("_Answer")
_CLIENTS = threading.Lock()  # boto3's session is not for threads, though what it makes is
_LONGEST_KEY = 1024  # bytes
_PIECE_BYTES = 1024, 65_536  # least and most to read at a time
_BROKEN = (ConnectionError, HTTPClientError, IncompleteReadError, FlexibleChecksumError, HTTPError, TimeoutError)
_AWAY = (EndpointConnectionError, ConnectTimeoutError)
_FAULTS = (ClientError, BotoCoreError, HTTPError, TimeoutError)
_PASSING_STATUS = frozenset({408, 409, 429, 500, 502, 503, 504})  # 409: a write of the same key was under way
_PASSING_CODES = frozenset({"InternalError", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"})
_EXPIRED_CODES = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired"})  # which come with status 400


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Limits:
    """How long a server may take, and how often it is asked again."""

    connect_s: float = 10.0
    """For a connection, seconds."""
    stall_s: float = 30.0
    """For a reply to begin, and between two bytes of it, seconds."""
    slowest_bytes_per_s: float = 16_384.0
    """A body that is slower, its first `stall_s` aside, is given up: another connection may be faster."""
    deadline_s: float = 240.0
    """For one body; and so long after the first attempt no other begins, seconds."""
    attempts: int = 8
    """Of each request, the first included. A server that has answered before, and cannot be connected to now, is asked
    until `deadline_s`: it is away, where one that never answered has another address."""
    first_pause_s: float = 0.4
    """Before the second attempt; each later pause is twice as long, seconds."""
    longest_pause_s: float = 16.0
    """No pause is longer, seconds: together they outlast the restart of a server."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or min(self.connect_s, self.stall_s, self.deadline_s) <= 0:
            raise ValueError("S3 limits need one attempt at least, and connect_s, stall_s and deadline_s positive")

    def pause_s(self, attempt: int) -> float:
        """Seconds to wait after an attempt, 1 being the first: half to all of the pause, so that clients spread out."""
        return random.uniform(0.5, 1.0) * min(self.longest_pause_s, self.first_pause_s * 2.0 ** (attempt - 1))


class S3Store:
    """A prefix of a bucket. What may pass is tried again, with jittered pauses, before it is an error."""

    def __init__(self, bucket: str, prefix: str, limits: S3Limits | None = None) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._limits = limits or S3Limits()
        self._answered = False

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.bucket, self.prefix.rstrip("/"), self._limits)  # clients do not travel

    @cached_property
    def _client(self) -> Any:
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=self._limits.connect_s,
            read_timeout=self._limits.stall_s,
            max_pool_connections=32,
        )
        try:
            with _CLIENTS:
                return boto3.client("s3", config=config)
        except ValueError as error:  # boto3 checks the endpoint's form here
            raise UsageError(f"{error}; AWS_ENDPOINT_URL needs a scheme: http://host:port") from error

    def list(self, prefix: str = "") -> Iterator[Entry]:
        where = {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
        while True:
            page = self._asked("list", partial(self._client.list_objects_v2, **where))
            for item in page.get("Contents", ()):
                key = item["Key"][len(self.prefix) :]
                if key and not (key.endswith("/") and item["Size"] == 0):  # a console's folder marker
                    yield Entry(key, item["Size"], item["ETag"].strip('"'))
            if not page["IsTruncated"]:
                return
            where["ContinuationToken"] = page["NextContinuationToken"]

    def head(self, key: str) -> Entry:
        if len((self.prefix + key).encode()) > _LONGEST_KEY:
            raise ObjectMissingError("no object of S3 has so long a key; list the source again")
        reply = self._asked("read", partial(self._client.head_object, **self._at(key)))
        return Entry(key, reply["ContentLength"], reply["ETag"].strip('"'))

    def get(self, key: str, *, max_bytes: int | None = None, etag: str | None = None) -> bytes:
        condition = {} if etag is None else {"IfMatch": f'"{etag}"'}

        def whole() -> bytes:
            reply = self._client.get_object(**self._at(key), **condition)
            with closing(reply["Body"]) as body:
                check_size(reply["ContentLength"], max_bytes)
                return _read(body, self._limits)

        return self._asked("read", whole)

    def put(self, key: str, data: bytes) -> None:
        self._asked("write", partial(self._client.put_object, **self._at(key), Body=data))

    def create(self, key: str, data: bytes) -> bool:
        attempts = 0

        def write() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                self._client.put_object(**self._at(key), Body=data, IfNoneMatch="*")
            except ClientError as error:
                if _http_status(error) != 412:
                    raise
                return False
            return True

        # An earlier attempt may have written, and only its reply was lost.
        return self._asked("write", write) or (attempts > 1 and self.get(key) == data)

    def move(self, key: str, to: str) -> None:
        source = self._at(key)
        self._asked("write", partial(self._client.copy_object, **self._at(to), CopySource=source))
        self._asked("write", partial(self._client.delete_object, **source))

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def _asked(self, action: str, request: Callable[[], _Answer]) -> _Answer:
        """The answer to a request, which is made again while its fault may pass and the limits allow.

        Raises:
            StoreError: as the last attempt failed.
        """
        attempt, last = 1, time.monotonic() + self._limits.deadline_s
        while True:
            try:
                answer = request()
                self._answered = True
                return answer
            except _FAULTS as error:
                pause_s = self._limits.pause_s(attempt)
                away = self._answered and isinstance(error, _AWAY)
                given_up = (attempt >= self._limits.attempts and not away) or time.monotonic() + pause_s > last
                if given_up or not _may_pass(error):
                    raise _store_error(action, error) from error
            time.sleep(pause_s)
            attempt += 1


def _read(body: Any, limits: S3Limits) -> bytes:
    """All of a body; botocore raises where its length or checksum is not what the headers say.

    Each piece is as large as all before it: a slow body is noticed early, and a fast one read in few pieces.

    Raises:
        TimeoutError: it is slower than the limits allow.
    """
    began, size, pieces = time.monotonic(), 0, []
    least, most = _PIECE_BYTES
    while piece := body.read(min(most, max(least, size))):
        pieces.append(piece)
        size += len(piece)
        seconds = time.monotonic() - began
        if seconds > limits.deadline_s or size < (seconds - limits.stall_s) * limits.slowest_bytes_per_s:
            raise TimeoutError(f"{size} bytes in {seconds:.0f} s")
    return b"".join(pieces)


def _may_pass(error: Exception) -> bool:
    if isinstance(error, ClientError):
        return _http_status(error) in _PASSING_STATUS or _code(error) in _PASSING_CODES
    return isinstance(error, _BROKEN)


def _store_error(action: str, error: Exception) -> StoreError:
    """Our error for one of botocore's: its text carries the fault's code, never the key."""
    if not isinstance(error, ClientError):
        return StoreError(f"S3 could not {action}: {type(error).__name__}; check network and the AWS_* variables")
    code, status = _code(error), _http_status(error)
    if status == 412:
        return ObjectChangedError("the object was replaced after it was planned")
    if code in ("NoSuchKey", "404"):
        return ObjectMissingError("the object is gone; list the source again")
    if code == "InvalidObjectState":
        return StoreError("the object is archived (S3 Glacier): restore the object, then score with --retry-failed")
    if code == "RequestTimeTooSkewed":
        return StoreError(f"S3 refused to {action}: {code}; set this machine's clock")
    if status in (401, 403) or code in _EXPIRED_CODES:
        cure = "renew the credentials (AWS_ACCESS_KEY_ID, ...), or let them do that here"
        return StoreError(f"S3 refused to {action}: {code}; {cure}")
    if status == 501 and action == "write":
        return StoreError(f"S3 could not {action}: {code}; use a server that honours If-None-Match on PUT")
    return StoreError(f"S3 could not {action}: {code}; check bucket and endpoint")


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _http_status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
