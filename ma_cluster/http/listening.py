"""Where a service listens, and who may ask it: beyond loopback only whoever has its token."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import ipaddress
import os
import re
import socket

from ma_cluster.errors import MaClusterError, UsageError
from ma_cluster.http.guard import LOOPBACK, HttpLimits

TOKEN_VARIABLE = "MA_CLUSTER_TOKEN"
_SHORTEST_TOKEN = 16  # characters
_TOKEN = re.compile(rf"[!-~]{{{_SHORTEST_TOKEN},}}")


def limits_of(host: str, limits: HttpLimits) -> HttpLimits:
    """The limits of a service that listens on an address: with the environment's token, where there is one.

    Raises:
        UsageError: it would listen beyond this machine without a token, or the token is none that a client can send.
    """
    token = token_sha256()
    if token is None and not _is_loopback(host):
        raise UsageError(
            f"to listen on {host} the service needs a token: set {TOKEN_VARIABLE}, or use --host 127.0.0.1"
        )
    return dataclasses.replace(limits, token_sha256=token, hosts=LOOPBACK | {host.lower()})


def check_free(host: str, port: int) -> None:
    """Serve's proxy listens with SO_REUSEPORT: it would share a port with whatever has it, and get half the requests.

    Raises:
        MaClusterError: somebody listens there.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UsageError(f"--host {host} is no address of this machine: {error.strerror}") from error
    in_use = MaClusterError(f"port {port} of {host} is in use: end what listens there, or give another --port")
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or a port counts as in use a minute after its end
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise in_use from error
            raise UsageError(f"nothing can listen on port {port} of {host}: {error.strerror}") from error
    with socket.socket(family, kind) as probe:
        probe.settimeout(1.0)
        if probe.connect_ex(address) == 0:
            raise in_use


def token_sha256() -> str | None:
    """Of the environment's token, None where there is none; raises UsageError: it is none that a header can carry."""
    token = os.environ.get(TOKEN_VARIABLE)
    if token is None:
        return None
    if _TOKEN.fullmatch(token) is None:  # an empty one would let everybody in
        raise UsageError(
            f"{TOKEN_VARIABLE} must be {_SHORTEST_TOKEN} visible ASCII characters or more, without spaces or line "
            "ends: `openssl rand -hex 32` makes one"
        )
    return hashlib.sha256(token.encode()).hexdigest()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
