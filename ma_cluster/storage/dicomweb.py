"""A DICOMweb server (PS3.18) as a source of photographs, and as a place to send DICOM results to.

    dicomweb+https://host/path?StudyDate=20260101-     QIDO-RS lists the instances that match; those of photographs
    studies/1.2/series/1.3/instances/1.4               a key, which WADO-RS gets, as it is stored
    `create`                                           STOW-RS sends one, unless it is there

An instance never changes under its UID, so its UID is its version. A listing does not know its size. Who asks is told
by DICOMWEB_TOKEN, or by DICOMWEB_USER and DICOMWEB_PASSWORD; they go to DICOMWEB_HOST alone, which must be set with
them, and beyond loopback by https alone. It is no `Store`, as nothing but DICOM can be put there.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from email.message import Message
from functools import cached_property, partial
from typing import Any
from urllib.parse import unquote_plus, urlencode, urlsplit

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    LocationValueError,
    NewConnectionError,
    ProtocolError,
    SSLError,
)

from ma_cluster.errors import ObjectChangedError, ObjectMissingError, ObjectRefusedError, StoreError, UsageError
from ma_cluster.image_config import DICOM_PHOTOGRAPHS
from ma_cluster.storage.network import Faults, NetworkLimits, Patience, read_body
from ma_cluster.storage.store import Entry, KeySet

SCHEME = "dicomweb+"
OWN_SERIES = "ma_cluster, research only"
"""Description of the series that results are sent as: what lies in one is no photograph."""
_PAGE = 200  # a server may read a header for each
_LARGEST_ANSWER = 2**26  # bytes, of JSON
_OVERHEAD = 2**16  # bytes of a multipart body around its part
_KEY = re.compile(r"((?:[\w.~-]+/)*?)studies/([0-9.]{1,64})/series/([0-9.]{1,64})/instances/([0-9.]{1,64})")
_STUDY, _SERIES, _INSTANCE, _KIND = "0020000D", "0020000E", "00080018", "00080016"
_SERIES_DESCRIPTION, _FAILED = "0008103E", "00081198"
_ASKED_BY = {
    "StudyDate": "00080020",
    "StudyTime": "00080030",
    "Modality": "00080060",
    "ModalitiesInStudy": "00080061",
    "StudyInstanceUID": _STUDY,
    "SeriesInstanceUID": _SERIES,
    "SOPInstanceUID": _INSTANCE,
    "SOPClassUID": _KIND,
    "InstitutionName": "00080080",
    "StationName": "00081010",
}
"""What a query may ask by, and its tags: nothing of it tells who a patient is."""
_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_REFUSED_STATUS = frozenset({400, 409, 413, 415, 422})  # of what was sent: the server may take another
_JSON = "application/dicom+json"
_PART10 = 'multipart/related; type="application/dicom"'
_BOUNDARY = "ma-cluster-boundary-5f3c1c9a"


class _StatusError(Exception):
    """The server answered, and not with what was asked for."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class DicomWeb:
    """A server's instances, or those that match a query. What may pass is tried again before it is an error."""

    def __init__(self, url: str, limits: NetworkLimits | None = None, page: int = _PAGE) -> None:
        """`page` is how many instances of a listing are asked for at a time.

        Raises:
            UsageError: it is no such URL, holds credentials, or may ask by patient; or credentials are set for no host.
        """
        parts = urlsplit(url.removeprefix(SCHEME))
        if not url.startswith(SCHEME) or parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError("a DICOMweb URL is dicomweb+https://host/path, or dicomweb+http://host/path")
        if "@" in parts.netloc:
            raise UsageError("a DICOMweb URL holds no credentials: set DICOMWEB_TOKEN, or DICOMWEB_USER and _PASSWORD")
        _check_query(parts.query)
        self._base = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
        self._page = page
        self._query = parts.query
        _credentials(self._base)
        self.url = f"{SCHEME}{self._base}" + (f"?{parts.query}" if parts.query else "")
        self._limits = limits or NetworkLimits()
        self._patience = Patience(self._limits, _FAULTS)
        self.skipped = 0
        """Instances of the latest listing that are no photographs: results, reports, other kinds; or without UIDs."""

    @cached_property
    def _pool(self) -> urllib3.PoolManager:
        timeout = urllib3.Timeout(connect=self._limits.connect_s, read=self._limits.stall_s)
        return urllib3.PoolManager(maxsize=32, timeout=timeout, retries=False)

    def list(self) -> Iterator[Entry]:
        """The photographs, page by page, each once: a server may repeat one while it grows.

        Raises:
            StoreError: the server does not answer, or gives its first page again and again.
        """
        self.skipped, offset, named = 0, 0, False
        with closing(KeySet()) as seen:
            while page := self._found("instances", {"limit": self._page, "offset": offset}, self._query):
                fresh = [(key, item) for item in page if seen.add(key := _key(item))]
                for key, item in fresh:
                    is_key = _KEY.fullmatch(key) is not None
                    named |= is_key
                    if is_key and _is_photograph(item):
                        yield Entry(key, 0, _first(item, _INSTANCE))
                    else:
                        self.skipped += 1
                if not named:
                    raise StoreError("the DICOMweb server lists instances without their UIDs; check the URL")
                if not fresh:  # a server that knows no offset
                    if len(page) == self._page:  # but a limit: what lies behind it cannot be had
                        raise StoreError(
                            f"the DICOMweb server knows no offset: it lists its first {self._page} instances alone;"
                            " narrow the query to fewer, such as a day (StudyDate), or name them in a manifest"
                        )
                    return
                offset += len(page)

    def head(self, key: str) -> Entry:
        """The instance as a listing shows it. Raises ObjectMissingError: it is not there."""
        root, study, series, instance = _parsed(key)
        found = self._found(f"{root}studies/{study}/series/{series}/instances", {_INSTANCE: instance})
        if not any(_first(item, _INSTANCE) == instance for item in found):
            raise ObjectMissingError("the server has no such instance; list the source again")
        return Entry(key, 0, instance)

    def get(self, key: str, *, max_bytes: int | None = None, etag: str | None = None) -> bytes:
        """The file of an instance; raises as `Store.get` does."""
        *_, instance = _parsed(key)
        if etag is not None and etag != instance:
            raise ObjectChangedError("the instance was planned under another UID")
        path, most = f"{self._base}/{key}", None if max_bytes is None else max_bytes + _OVERHEAD
        accept = f"{_PART10}; transfer-syntax=*"
        return self._patience.ask("read", lambda: _part(*self._answer("GET", path, {"Accept": accept}, most=most)))

    def create(self, key: str, data: bytes) -> bool:
        """Send an instance, whose key follows from its UIDs; False where it is there. Raises ObjectRefusedError."""
        if self._has(key):
            return False
        head = f"--{_BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        body = head + data + f"\r\n--{_BOUNDARY}--\r\n".encode()
        headers = {"Content-Type": f"{_PART10}; boundary={_BOUNDARY}", "Accept": _JSON}
        send = partial(self._answer, "POST", f"{self._base}/studies", headers, body=body, most=_LARGEST_ANSWER)
        _, answer = self._patience.ask("store", send)
        try:
            stored = _json(answer) if answer else {}
        except ProtocolError:  # XML, or words: whether it is there tells
            stored = {} if self._has(key) else {_FAILED: {"Value": ["all"]}}
        if isinstance(stored, dict) and _first(stored, _FAILED):
            raise ObjectRefusedError("the DICOMweb server refused to store a result; its log says why")
        return True

    def _has(self, key: str) -> bool:
        try:
            self.head(key)
        except ObjectMissingError:
            return False
        return True

    def _found(self, path: str, fields: dict[str, Any], query: str = "") -> Sequence[dict[str, Any]]:
        asked = "&".join(filter(None, (query, urlencode(fields | {"includefield": _SERIES_DESCRIPTION}))))
        url = f"{self._base}/{path}?{asked}"

        def ask() -> Sequence[dict[str, Any]]:
            _, answer = self._answer("GET", url, {"Accept": _JSON}, most=_LARGEST_ANSWER)
            found = _json(answer) if answer else []
            if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
                raise ProtocolError("a listing that is none")
            return found

        return self._patience.ask("list", ask)

    def _answer(
        self, method: str, url: str, headers: dict[str, str], *, body: bytes | None = None, most: int | None = None
    ) -> tuple[str, bytes]:
        """Content type and body of a whole answer."""
        headers = headers | _credentials(self._base) | {"Accept-Encoding": "identity"}
        response = self._pool.request(method, url, headers=headers, body=body, preload_content=False, redirect=False)
        with closing(response):
            if response.status not in (200, 202, 204):
                raise _StatusError(response.status)
            data = read_body(response, self._limits, most)
            response.release_conn()
            return response.headers.get("Content-Type", ""), data


def _check_query(query: str) -> None:
    """Raises UsageError: it asks by something that may tell who a patient is, however that is written."""
    for part in filter(None, re.split("[&;]", unquote_plus(query))):
        name, _, _ = part.partition("=")
        if name not in (*_ASKED_BY, "limit", "offset") and name.upper() not in _ASKED_BY.values():
            raise UsageError(
                f"a DICOMweb URL may not ask by {name[:64]!r}, as a run's URL is written down and must name no patient:"
                f" ask by {', '.join(_ASKED_BY)}"
            )


def _credentials(url: str) -> dict[str, str]:
    """The header that tells a server who asks; empty where the credentials are for another, or would go in the clear.

    Raises:
        UsageError: they are set, and DICOMWEB_HOST is not.
    """
    variables, parts = os.environ, urlsplit(url)
    if token := variables.get("DICOMWEB_TOKEN"):
        told = f"Bearer {token}"
    elif user := variables.get("DICOMWEB_USER"):
        pair = f"{user}:{variables.get('DICOMWEB_PASSWORD', '')}".encode()
        told = f"Basic {base64.b64encode(pair).decode()}"
    else:
        return {}
    host = variables.get("DICOMWEB_HOST", "").lower()
    if not host:
        raise UsageError("credentials of a DICOMweb server are set without its name: set DICOMWEB_HOST, too")
    private = parts.scheme == "https" or _is_loopback(parts.hostname or "")
    return {"Authorization": told} if private and host in (parts.hostname, parts.netloc.lower()) else {}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _part(content_type: str, body: bytes) -> bytes:
    """The first part of a multipart body.

    Raises:
        ProtocolError: its closing boundary is not there, so it broke off.
    """
    told = Message()
    told["Content-Type"] = content_type
    boundary = told.get_param("boundary")
    if not isinstance(boundary, str):
        if told.get_content_type() == "application/dicom":
            return body
        raise ProtocolError("an instance that is none")
    line = b"--" + boundary.encode()
    begin, end = body.find(b"\r\n\r\n", body.find(line)), body.find(b"\r\n" + line, body.find(line) + len(line))
    if begin < 0 or end < 0 or not body.rstrip().endswith(line + b"--"):
        raise ProtocolError("a body that broke off")
    return body[begin + 4 : end]


def _key(item: dict[str, Any]) -> str:
    """Of an instance, by its UIDs; one that is no key where they are none."""
    study, series, instance = (_first(item, tag) for tag in (_STUDY, _SERIES, _INSTANCE))
    return f"studies/{study}/series/{series}/instances/{instance}"


def _is_photograph(item: dict[str, Any]) -> bool:
    kind = _first(item, _KIND)
    return (not kind or kind in DICOM_PHOTOGRAPHS) and _first(item, _SERIES_DESCRIPTION) != OWN_SERIES


def _first(item: dict[str, Any], tag: str) -> str:
    element = item.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return str(values[0]) if isinstance(values, list) and values else ""


def _parsed(key: str) -> tuple[str, ...]:
    match = _KEY.fullmatch(key)
    if match is None or ".." in key.split("/"):
        raise ObjectMissingError("this names no instance of a DICOMweb server")
    return match.groups()


def _json(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("an answer that is no JSON") from error


def _may_pass(error: Exception) -> bool:
    if isinstance(error, _StatusError):
        return error.status in _PASSING_STATUS
    return not isinstance(error, SSLError | LocationValueError)


def _store_error(action: str, error: Exception) -> StoreError:
    what = f"the DICOMweb server could not {action}"
    if not isinstance(error, _StatusError):
        return StoreError(f"{what}: {type(error).__name__}; check network and URL")
    if error.status in (404, 410):
        return ObjectMissingError("the instance is gone; list the source again")
    if error.status in (401, 403):
        return StoreError(
            f"{what}: status {error.status}; check DICOMWEB_TOKEN, or DICOMWEB_USER and DICOMWEB_PASSWORD, and that"
            " DICOMWEB_HOST is the URL's host: they go nowhere else, and nowhere by http"
        )
    if action == "store" and error.status in _REFUSED_STATUS:
        return ObjectRefusedError(f"{what} a result: status {error.status}; its log says why")
    if 300 <= error.status < 400:
        return StoreError(f"{what}: it redirects; give the URL that it redirects to")
    return StoreError(f"{what}: status {error.status}; check the URL, and the server's log")


_KNOWN, _AWAY = (_StatusError, HTTPError, TimeoutError), (NewConnectionError, ConnectTimeoutError)
_FAULTS = Faults(_KNOWN, _AWAY, _may_pass, _store_error)
