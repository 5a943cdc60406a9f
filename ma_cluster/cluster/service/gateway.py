"""The HTTP service on a cluster: a Gateway in front of the warm fleet that archive runs of its own share.

    <name>-reader, <name>-segmenter    the fleet (scoring_app.py)
    <name>-gateway                     HTTP (http/api.py), archive jobs (job_runner.py), metrics from the stores

Three Serve applications: `ma-cluster serve` starts them on a Ray, `reader`, `segmenter` and `gateway` build them from
the arguments of a Serve config file, as KubeRay's RayService has it.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import BaseModel
from ray import serve

from ma_cluster.archive.outcomes import config_digest
from ma_cluster.bundle import Bundle, load_bundle
from ma_cluster.cluster import recording
from ma_cluster.cluster.connection import connected, quieten, starts_own
from ma_cluster.cluster.fleet.driver import model_of
from ma_cluster.cluster.fleet.replicas import Fleet
from ma_cluster.cluster.fleet.scoring_app import ScoringApp, reader_app, segmenter_app
from ma_cluster.cluster.service.job_runner import JobRunner
from ma_cluster.errors import FleetBrokenError, MaClusterError, UsageError
from ma_cluster.http.api import create_api
from ma_cluster.http.fleet_service import Backing, FleetService
from ma_cluster.http.guard import HttpLimits
from ma_cluster.http.jobs import ArchiveJobs
from ma_cluster.http.listening import TOKEN_VARIABLE, check_free, limits_of, token_sha256

log = logging.getLogger(__name__)
FLEET_NAME = "ma-cluster"
_RECONCILE_S = 2.0
_CONNECTIONS = 256  # that reach the Gateway at a time: more than it lets in, so that it can refuse, and tell its health
_STOP_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """The service beside its fleet."""

    model: str
    """Name of a shipped model, URL of a bundle, or its folder, which each node must see under the same path."""
    fleet: Fleet
    """With its name and its number of Segmenters."""
    state: str
    """URL where the archive jobs are kept: whoever serves them next goes on with them."""
    archives_at_once: int = 1
    limits: HttpLimits = field(default_factory=HttpLimits)


class Gateway:
    """The ingress deployment."""

    def __init__(self, config: GatewayConfig) -> None:
        bundle, fleet = load_bundle(config.model), config.fleet
        jobs = _jobs(config, bundle)
        runner = job_runner(jobs, config)
        assert fleet.name is not None
        self._limits = dataclasses.replace(config.limits, max_body_bytes=bundle.recipe.image.max_bytes)
        backing = Backing(ScoringApp(fleet.name, fleet), jobs, runner.running, recording.Recorder())
        self._service = FleetService(backing, bundle)
        threading.Thread(target=_keep_reconciled, args=(runner, self._service.changed), daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        return create_api(self._service, self._limits)


def _jobs(config: GatewayConfig, bundle: Bundle) -> ArchiveJobs:
    """The jobs of a service that scores with this model."""
    decoder = config.fleet.sandbox.decoder
    return ArchiveJobs(config.state, bundle.digest, partial(config_digest, bundle.recipe, decoder))


def job_runner(jobs: ArchiveJobs, config: GatewayConfig) -> JobRunner:
    """Runs the jobs on the fleet of the service."""
    return JobRunner(jobs, ("--model", config.model, "--fleet", str(config.fleet.name)), config.archives_at_once)


def _keep_reconciled(runner: JobRunner, changed: threading.Event) -> None:
    while True:
        changed.wait(_RECONCILE_S)
        changed.clear()
        try:
            runner.reconcile()
        except MaClusterError as error:
            log.warning("archive jobs wait: %s", error)
        except Exception:  # without this thread no job would start again, and nothing would say so
            log.exception("archive jobs wait")


def gateway_app(config: GatewayConfig) -> serve.Application:
    """The Serve application of the Gateway."""
    deployment = serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=_CONNECTIONS)(
        serve.ingress()(Gateway)
    )
    return deployment.bind(config)


@contextmanager
def serving(config: GatewayConfig, host: str, port: int) -> Iterator[str]:
    """The service is up within the block; its URL. Archive jobs that it leaves unfinished go on with the next one.

    Raises:
        UsageError: it would listen beyond this machine without a token, or the token is none that a client can send,
            or it needs more than this machine has, where no cluster is given.
        BundleError: the model is damaged or not there.
        StoreError: the store of the jobs cannot be written.
        MaClusterError: the port is in use.
        FleetBrokenError: the fleet does not start.
    """
    limits = limits_of(host, config.limits)
    if starts_own(config.fleet.address):
        config.fleet.check_fits()
        check_free(host, port)  # elsewhere it is the cluster's head that listens
    bundle = load_bundle(config.model)
    model, jobs = model_of(config.model, bundle), _jobs(config, bundle)
    with connected(config.fleet.address, waiting_cpus=config.fleet.readers + 1):
        fleet = dataclasses.replace(config.fleet.sized(_MANY), name=config.fleet.name or FLEET_NAME)
        limits = dataclasses.replace(limits, waiting=2 * fleet.in_flight)
        config = dataclasses.replace(config, fleet=fleet, limits=limits)
        quieten()
        _listen(host, port)
        app = ScoringApp.deploy(str(fleet.name), None, model, fleet)
        try:
            _run_gateway(config)
            yield f"http://{host}:{port}"
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the way out is not to be cut short
            serve.delete(f"{fleet.name}-gateway")  # first: it would start them again
            job_runner(jobs, config).stop(_STOP_S)
            app.delete()


def _listen(host: str, port: int) -> None:
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    if not serve.status().proxies:
        raise FleetBrokenError(
            "Serve runs on this cluster without HTTP, as archive runs start it; "
            "end it by `serve shutdown` while no run is under way, and give the command again"
        )


def _run_gateway(config: GatewayConfig) -> None:
    try:
        serve.run(gateway_app(config), name=f"{config.fleet.name}-gateway", route_prefix="/")
    except RuntimeError as error:
        raise FleetBrokenError(f"the gateway does not start: {error}") from error


_MANY = 10**9


class ServiceArguments(BaseModel):
    """What a Serve config file says of the service; each of its three applications is given the same."""

    model: str = "lite"
    state: str
    name: str = FLEET_NAME
    segmenters: int = 1
    readers: int = 1
    gpus: float = 0.0
    threads: int = 1
    archives_at_once: int = 1
    deadline: float = 600.0

    def config(self) -> GatewayConfig:
        """As dataclasses. The token's variable must be set: what listens there is unknown here.

        Raises:
            UsageError: it is not, or no client can send what it holds.
        """
        token = token_sha256()
        if token is None:
            raise UsageError(f"the service needs a token: set {TOKEN_VARIABLE} in the cluster's environment")
        fleet = Fleet(
            name=self.name,
            segmenters=self.segmenters,
            readers=self.readers,
            gpus_per_segmenter=self.gpus,
            threads_per_segmenter=self.threads,
            segment_deadline_s=self.deadline,
        )
        limits = HttpLimits(token_sha256=token, waiting=2 * fleet.in_flight)
        at_once = self.archives_at_once
        return GatewayConfig(model=self.model, fleet=fleet, state=self.state, archives_at_once=at_once, limits=limits)


def reader(arguments: ServiceArguments) -> serve.Application:
    """For a Serve config file: the application `<name>-reader`."""
    return reader_app(model_of(arguments.model, load_bundle(arguments.model)), arguments.config().fleet)


def segmenter(arguments: ServiceArguments) -> serve.Application:
    """For a Serve config file: the application `<name>-segmenter`."""
    return segmenter_app(model_of(arguments.model, load_bundle(arguments.model)), arguments.config().fleet)


def gateway(arguments: ServiceArguments) -> serve.Application:
    """For a Serve config file: the application `<name>-gateway`, with the route prefix `/`."""
    return gateway_app(arguments.config())
