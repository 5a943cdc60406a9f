"""The Ray that a command runs on: the one of this process, a cluster at an address, or a local one for its duration.

`python -m ma_cluster.cluster.connection` starts a local one, runs a task on it and says so: `ma-cluster doctor` asks.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import ray
from ray.exceptions import RayError, RayTaskError

from ma_cluster import machine
from ma_cluster.errors import ClusterError, MaClusterError, UsageError

log = logging.getLogger(__name__)
LOCAL = "local"
_LOCAL_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # Ray's 0.1 takes 2.5 % of a core from the networks
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ma_cluster.http.connection.bound_connections",
}
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
_ANSWER_S = 5.0
_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The shortest first frame of HTTP/2, on which gRPC rests: empty settings. The fourth byte is the type."""
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS
_CLUSTER_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId"
_OTHERS = {
    "http": "is what `ma-cluster submit` takes",
    "https": "is what `ma-cluster submit` takes",
    "ray": "is for Ray's client, which cannot drive a run",
}


@contextmanager
def connected(address: str | None, *, waiting_cpus: int, object_store_bytes: int | None = None) -> Iterator[None]:
    """Ray is up within the block; what was started for it is stopped after.

    Args:
        address: HOST:PORT of a cluster's head, `auto` for the one on this machine, `local` for a Ray of its own; None
            for the Ray that is up in this process, else RAY_ADDRESS's (a submitted job finds it set), else a local one
            on loopback.
        waiting_cpus: logical CPUs of a local Ray on top of the cores, for workers that mostly wait.
        object_store_bytes: of a local Ray; beyond them objects are spilled to disk. None leaves Ray's choice.

    Raises:
        UsageError: the address is none of a Ray cluster.
        ClusterError: no cluster answers there, or it does not take this process.
    """
    if ray.is_initialized():
        yield
        return
    for variable, value in _LOCAL_RAY.items():
        os.environ.setdefault(variable, value)
    on_sigterm = signal.getsignal(signal.SIGTERM)  # ray.init installs its own, which exits with 15
    cluster = _cluster(address)
    if cluster is None:
        log.info("starting Ray")
        _start(machine.cores() + waiting_cpus, object_store_bytes)
    else:
        log.info("connecting to Ray")
        _join(cluster)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()  # takes a local Ray's processes with it, Serve's among them


def starts_own(address: str | None) -> bool:
    """Whether `connected` starts a Ray, on this machine alone: what that lacks, no other node will bring.

    Raises:
        UsageError, ClusterError: as `connected` would raise it; this is to be known before anything is begun.
    """
    return not ray.is_initialized() and _cluster(address) is None


def check_gpus(address: str | None, wanted: float) -> None:
    """Refuse GPUs that a Ray about to be started will never have.

    Raises:
        UsageError: this machine has fewer.
        UsageError, ClusterError: as `connected` would raise it.
    """
    if starts_own(address) and wanted and wanted > (there := machine.gpus()):
        raise UsageError(
            f"needs {wanted:g} GPU in all, {there or 'none'} here: lower --gpus, or give a cluster's --address"
        )


def answer(refs: Any) -> Any:
    """`ray.get`, through which comes what a task or an actor has raised on purpose, as it is."""
    try:
        return ray.get(refs)
    except RayTaskError as error:
        if isinstance(error.cause, MaClusterError):
            raise error.cause from None
        raise


def quieten() -> None:
    """Keep Ray's libraries from writing between a command's own lines; their log files hold it all."""
    for name in ("ray.data", "ray.serve"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)


def _cluster(address: str | None) -> str | None:
    """The address of the cluster to join, None for a Ray of one's own; raises as `connected` does."""
    wanted = address or os.environ.get("RAY_ADDRESS") or LOCAL
    if wanted not in (LOCAL, "auto"):
        _check_answers(wanted)
        _check_token(wanted)
    return None if wanted == LOCAL else wanted


def _start(cpus: int, object_store_bytes: int | None) -> None:
    context: Any = ray.init(
        address=LOCAL,  # whatever RAY_ADDRESS says
        _node_ip_address="127.0.0.1",
        num_cpus=cpus,
        object_store_memory=object_store_bytes,
        include_dashboard=False,
        **_QUIET,
    )
    _announce_exporter(context.address_info)


def _join(address: str) -> None:
    try:
        ray.init(address=address, **_QUIET)
    except (RayError, ConnectionError, RuntimeError) as error:
        raise ClusterError(
            f"the Ray cluster at {address} does not take this process: {str(error).rstrip('.')}; check the address, "
            "the token (RAY_AUTH_TOKEN), and that both have the same version of Ray"
        ) from error


def _check_answers(address: str) -> None:
    """Find out in seconds what takes `ray.init` minutes: whether something like a Ray's GCS listens at an address."""
    scheme, _, rest = address.rpartition("://")
    host, _, port = rest.rpartition(":")
    if scheme or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        known = f": {scheme}:// {_OTHERS[scheme]}" if scheme in _OTHERS else ""
        raise UsageError(
            f"'{address}' is no address of a Ray cluster{known}; give its head as HOST:PORT, e.g. head:6379"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S) as line:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return  # it answers to nobody without a certificate
            line.settimeout(_ANSWER_S)
            line.sendall(_HELLO)
            answer = line.recv(len(_SETTINGS))
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name that can be no host's
        fault = getattr(error, "strerror", None) or "no answer"  # a timeout has no text
        raise ClusterError(
            f"no Ray cluster answers at {address} ({fault}); check the address, and that its head is up"
        ) from error
    if answer[3:4] != _SETTINGS[3:4]:
        raise ClusterError(
            f"what answers at {address} is no head of a Ray cluster; its port is 6379 unless it was given another"
        )


def _check_token(address: str) -> None:
    """Ask the GCS what Ray asks it first: with a wrong token Ray asks for 20 s, and complains each second.

    Raises:
        ClusterError: it does not take this process's token.
    """
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    with grpc.insecure_channel(address) as channel:
        try:
            sent = (("authorization", f"Bearer {_token()}"),)
            channel.unary_unary(_CLUSTER_ID)(b"", timeout=_ANSWER_S, metadata=sent)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:  # Ray itself tells of all else
                raise ClusterError(
                    f"the Ray cluster at {address} asks for another token: set RAY_AUTH_TOKEN, or put the cluster's "
                    "into ~/.ray/auth_token"
                ) from error


def _token() -> str:
    """What this process sends to a cluster, found where Ray finds it; empty where there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    try:
        return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser().read_text().strip()
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return ""


def _announce_exporter(address: dict[str, Any]) -> None:
    """Write the file by which Prometheus finds a Ray's metrics, where a dashboard would: without one Ray does not."""
    targets = [f"{address['node_ip_address']}:{address['metrics_export_port']}"]
    there = Path(address["session_dir"]) / "prom_metrics_service_discovery.json"
    new = there.with_suffix(".new")
    new.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": targets}]))
    new.replace(there)


def main() -> None:
    """Start a Ray, run a task on it, and write how long that took, and the ports that other machines can reach."""
    began = time.perf_counter()
    with connected(LOCAL, waiting_cpus=0):
        ray.get(ray.remote(_ready).remote(), timeout=60)
        seconds, ports = time.perf_counter() - began, machine.open_ports(os.getpid())
    sys.stdout.write(f"{ray.__version__}, started and ran a task in {seconds:.0f} s\n{json.dumps(ports)}\n")


def _ready() -> bool:
    return True


if __name__ == "__main__":
    main()
