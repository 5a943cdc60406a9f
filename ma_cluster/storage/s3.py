"""A prefix of an S3 bucket as a `Store`, over a network and a server that may break at any byte.

botocore tries once: what may pass is tried again by network.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property, partial
from typing import Any

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
    ParamValidationError,
)
from urllib3.exceptions import HTTPError

from ma_cluster.errors import ObjectChangedError, ObjectMissingError, StoreError, UsageError
from ma_cluster.storage.network import Faults, NetworkLimits, Patience, read_body
from ma_cluster.storage.store import Entry, check_bytes

_CLIENTS = threading.Lock()  # boto3's session is not for threads, though what it makes is
_LONGEST_KEY = 1024  # bytes
_BROKEN = (ConnectionError, HTTPClientError, IncompleteReadError, FlexibleChecksumError, HTTPError, TimeoutError)
_AWAY = (EndpointConnectionError, ConnectTimeoutError)
_FAULTS = (ClientError, BotoCoreError, HTTPError, TimeoutError)
_PASSING_STATUS = frozenset({408, 409, 429, 500, 502, 503, 504})  # 409: a write of the same key was under way
_PASSING_CODES = frozenset({"InternalError", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"})
_EXPIRED_CODES = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired"})  # which come with status 400


class S3Store:
    """A prefix of a bucket. What may pass is tried again, with jittered pauses, before it is an error."""

    def __init__(self, bucket: str, prefix: str, limits: NetworkLimits | None = None) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._limits = limits or NetworkLimits()
        self._patience = Patience(self._limits, Faults(_FAULTS, _AWAY, _may_pass, _store_error))

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
            page = self._patience.ask("list", partial(self._client.list_objects_v2, **where))
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
        reply = self._patience.ask("read", partial(self._client.head_object, **self._at(key)))
        return Entry(key, reply["ContentLength"], reply["ETag"].strip('"'))

    def get(self, key: str, *, max_bytes: int | None = None, etag: str | None = None) -> bytes:
        condition = {} if etag is None else {"IfMatch": f'"{etag}"'}

        def whole() -> bytes:
            reply = self._client.get_object(**self._at(key), **condition)
            with closing(reply["Body"]) as body:
                check_bytes(reply["ContentLength"], max_bytes)
                return read_body(body, self._limits)

        return self._patience.ask("read", whole)

    def put(self, key: str, data: bytes) -> None:
        self._patience.ask("write", partial(self._client.put_object, **self._at(key), Body=data))

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
        return self._patience.ask("write", write) or (attempts > 1 and self.get(key) == data)

    def move(self, key: str, to: str) -> None:
        source = self._at(key)
        self._patience.ask("write", partial(self._client.copy_object, **self._at(to), CopySource=source))
        self._patience.ask("write", partial(self._client.delete_object, **source))

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + key}


def _may_pass(error: Exception) -> bool:
    if isinstance(error, ClientError):
        return _http_status(error) in _PASSING_STATUS or _code(error) in _PASSING_CODES
    return isinstance(error, _BROKEN)


def _store_error(action: str, error: Exception) -> StoreError:
    """Our error for one of botocore's: its text carries the fault's code, never the key."""
    if isinstance(error, ParamValidationError):  # botocore asks no server
        return ObjectMissingError("S3 can have no such bucket or key, or the key is empty; check the URL")
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
        if code == "403":  # a HEAD, whose answer has no words
            cure += "; without s3:ListBucket, S3 answers so where there is no such object, too"
        return StoreError(f"S3 refused to {action}: {code}; {cure}")
    if status == 501 and action == "write":
        return StoreError(f"S3 could not {action}: {code}; use a server that honours If-None-Match on PUT")
    return StoreError(f"S3 could not {action}: {code}; check bucket and endpoint")


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _http_status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
