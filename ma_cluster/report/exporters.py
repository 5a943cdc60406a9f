"""Where metrics are read: a Prometheus, an exporter, or the file in which Ray lists the exporters of its nodes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

from ma_cluster.errors import MaClusterError
from ma_cluster.report.top import PREFIXES, Page

LOCAL_RAY = "/tmp/ray/session_latest/prom_metrics_service_discovery.json"
"""Of the Ray that was started last on this machine."""
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A Prometheus by its URL; it knows what it scraped last."""

    url: str

    def read(self) -> Page:
        """Raises MaClusterError: it does not answer."""
        match = '{__name__=~"' + "|".join(f"{prefix}.+" for prefix in PREFIXES) + '"}'
        url = f"{self.url.rstrip('/')}/federate?{urlencode({'match[]': match})}"
        try:
            return Page.parse(time.monotonic(), [_fetch(url)])
        except (OSError, ValueError) as error:
            raise MaClusterError(f"no Prometheus at {self.url} ({error}); start one with `make monitor`") from error


@dataclass(frozen=True, slots=True)
class Exporters:
    """An exporter by its URL, or all exporters of a Ray by the file that lists them."""

    where: str = LOCAL_RAY

    def read(self) -> Page:
        """Of all that answer: a node that is lost stays in the list for a while.

        Raises:
            MaClusterError: none answers.
        """
        texts, failures = [], []
        for url in self._urls():
            try:
                texts.append(_fetch(url))
            except OSError as error:
                failures.append(f"{url}: {error}")
        if not texts:
            said = "; ".join(failures) or "it lists none"
            raise MaClusterError(f"no exporter of {self.where} answers ({said}); is that Ray still up?")
        try:
            return Page.parse(time.monotonic(), texts)
        except ValueError as error:
            raise MaClusterError(f"{self.where} holds no metrics ({error}); name an exporter's /metrics") from error

    def _urls(self) -> list[str]:
        if self.where.startswith(("http://", "https://")):
            return [self.where]
        try:
            groups = json.loads(Path(self.where).read_text())
            return [f"http://{target}/metrics" for group in groups for target in group["targets"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            cure = "start a run on this machine, or name the file, an exporter or a Prometheus"
            raise MaClusterError(f"{self.where} lists no exporters ({type(error).__name__}); {cure}") from error


def _fetch(url: str) -> str:
    """Raises OSError: no answer, or an error's."""
    try:
        with urlopen(url, timeout=_TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except URLError as error:
        raise OSError(str(error.reason)) from error
