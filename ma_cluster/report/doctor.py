"""Looks at the machine before a long run does: a finding, with its cure, for each thing such runs have failed on."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ma_cluster import machine
from ma_cluster.errors import MaClusterError
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.store import open_store

GIB = 2**30
PROBE_KEY = "ma-cluster-doctor.txt"
"""One fixed key, so that however often a store without deletion is examined, one small object stays."""
PORTS = {8000: "the HTTP service", 8265: "Ray's dashboard"}
_PACKAGES = {"torch": "torch", "numpy": "numpy", "opencv-python-headless": "cv2", "pyarrow": "pyarrow"}


class Level(StrEnum):
    """How a finding bears on a run: it can go ahead, it may suffer, it cannot work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's. `cure` says what to do, and is empty where nothing need be done."""

    level: Level
    name: str
    text: str
    cure: str = ""


def examine(model: str, store_url: str | None) -> Iterator[Finding]:
    """All findings, as they are made; the slow ones (the model, Ray) come last."""
    yield python_version(sys.version_info[:3])
    packages = [package(distribution, module) for distribution, module in _PACKAGES.items()]
    yield from packages
    yield cores(machine.cores())
    yield memory(machine.memory_bytes())
    yield disk(Path(tempfile.gettempdir()))
    yield shared_memory(Path("/dev/shm"))
    yield private(Path(tempfile.gettempdir()) / "ray", Path.home)
    for port, use in PORTS.items():
        yield port_free(port, use)
    if store_url is not None:
        yield conditional_writes(store_url)
    if any(finding.level is Level.FAIL for finding in packages):
        return  # what follows needs them
    yield gpu()
    yield loads(model)
    yield ray_starts()


def python_version(version: tuple[int, ...]) -> Finding:
    """Python is new enough."""
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Finding(Level.FAIL, "python", text, "install Python 3.11 or newer")
    return Finding(Level.OK, "python", text)


def package(distribution: str, module: str) -> Finding:
    """A package is installed and its libraries load."""
    try:
        importlib.import_module(module)
        return Finding(Level.OK, module, importlib.metadata.version(distribution))
    except (ImportError, OSError) as error:  # OSError: a shared library of it does not load
        return Finding(
            Level.FAIL, module, f"cannot be imported: {error}", f"pip install --force-reinstall {distribution}"
        )


def cores(count: int) -> Finding:
    """At least two cores: with one, reading and scoring take turns."""
    if count < 2:
        return Finding(Level.WARN, "cores", str(count), "give the process two cores or more")
    return Finding(Level.OK, "cores", str(count))


def memory(size: int) -> Finding:
    """Ray and one replica take about 4 GiB, a photograph at full size 1 GiB more."""
    text = f"{size / GIB:.1f} GiB"
    if size < 3 * GIB:
        return Finding(Level.FAIL, "memory", text, "4 GiB is the least, 8 GiB or more is comfortable")
    if size < 7.5 * GIB:
        return Finding(Level.WARN, "memory", text, "use --replicas 1, or a machine with 8 GiB or more")
    return Finding(Level.OK, "memory", text)


def disk(folder: Path) -> Finding:
    """Room for Ray's object store to spill; it stops spilling on a disk that is 95 % full."""
    usage = shutil.disk_usage(folder)
    text = f"{usage.free / GIB:.0f} GiB free under {folder}"
    if usage.free < GIB:
        return Finding(Level.FAIL, "disk", text, "free some space, or set TMPDIR and RAY_TMPDIR to another disk")
    if usage.free < 0.05 * usage.total or usage.free < 5 * GIB:
        return Finding(Level.WARN, "disk", text, "Ray cannot spill to a disk that is 95 % full: free some space")
    return Finding(Level.OK, "disk", text)


def shared_memory(folder: Path) -> Finding:
    """Room for Ray's object store, which holds photographs between two processes; without it lies on disk."""
    if not folder.is_dir():
        return Finding(Level.OK, "shared memory", "this system has no folder for it")
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free under {folder}"
    if free < GIB:
        return Finding(
            Level.WARN, "shared memory", text, "give the container more (--shm-size=4g), or Ray writes to disk"
        )
    return Finding(Level.OK, "shared memory", text)


def private(ray_files: Path, home: Callable[[], Path]) -> Finding:
    """Others on this machine read neither Ray's token nor what Ray writes: whoever has the token can run code here."""
    name, cures = "ray's files", []
    try:
        token = home() / ".ray" / "auth_token"
        if token.is_file() and token.stat().st_mode & 0o077:
            cures.append(f"chmod 600 {token}")
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return Finding(Level.OK, name, "there is no home for a token; each Ray has one that its processes alone know")
    shared = [each for each in ray_files.glob("session_2*") if each.stat().st_mode & 0o077]
    if shared:
        cures.append(f"set RAY_TMPDIR to a folder of your own: {len(shared)} sessions under {ray_files} are open")
    if cures:
        return Finding(Level.WARN, name, "others on this machine can read some", "; ".join(cures))
    return Finding(Level.OK, name, "token and sessions are for this user alone")


def port_free(port: int, use: str) -> Finding:
    """Nobody listens on a port of loopback that a command uses by default."""
    from ma_cluster.http.listening import check_free  # which loads a web server

    try:
        check_free("127.0.0.1", port)
    except MaClusterError as error:
        return Finding(Level.WARN, f"port {port}", f"not free for {use}", str(error))
    return Finding(Level.OK, f"port {port}", f"free for {use}")


def gpu() -> Finding:
    """torch sees the GPU that the machine has. None is no fault."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return Finding(Level.OK, "gpu", ", ".join(names))
    if shutil.which("nvidia-smi"):
        cure = "install a CUDA build of torch that suits the driver: pip install --force-reinstall torch"
        return Finding(Level.WARN, "gpu", f"there is a driver, but torch {torch.__version__} sees no GPU", cure)
    return Finding(Level.OK, "gpu", "none; the networks run on the CPU")


def conditional_writes(url: str) -> Finding:
    """The store can be written and read, and creates an object once only: on that rests that no outcome is lost."""
    try:
        store = open_store(url)
        store.create(PROBE_KEY, b"first")
        again = store.create(PROBE_KEY, b"second")
        kept = store.get(PROBE_KEY)
    except MaClusterError as error:
        return Finding(Level.FAIL, "store", str(error), "check the URL, the AWS_* variables and the write permission")
    if again or kept != b"first":
        cure = "use a server that honours If-None-Match on PUT, e.g. AWS S3, MinIO or SeaweedFS"
        return Finding(Level.FAIL, "store", "a second conditional write replaced the first", cure)
    if isinstance(store, LocalStore):
        (store.root / PROBE_KEY).unlink()
        return Finding(Level.OK, "store", "written, read, conditional writes honoured")
    return Finding(Level.OK, "store", f"written, read, conditional writes honoured; {PROBE_KEY} may be deleted")


def loads(model: str) -> Finding:
    """The model is there, whole, and fits its networks."""
    from ma_cluster.lesions.detector import Detector

    try:
        return Finding(Level.OK, "model", f"{model}, digest {Detector.load(model).digest[:16]}")
    except MaClusterError as error:
        return Finding(Level.FAIL, "model", str(error), "reinstall ma_cluster, or name a bundle's folder or URL")


def ray_starts(timeout_s: float = 120) -> Finding:
    """A local Ray starts and runs a task; in a process of its own, since a Ray that cannot start may also hang."""
    command = [sys.executable, "-m", "ma_cluster.cluster.connection"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return Finding(Level.FAIL, "ray", f"did not start in {timeout_s:.0f} s", "see /tmp/ray/session_latest/logs")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding(Level.FAIL, "ray", f"did not start: {last}", "see /tmp/ray/session_latest/logs")
    *_, text, ports = done.stdout.strip().splitlines()
    return reachable(text, json.loads(ports))


def reachable(text: str, ports: list[int]) -> Finding:
    """What other machines can reach of a local Ray asks for Ray's token; nothing of it listens by our choice."""
    if not ports:
        return Finding(Level.OK, "ray", f"{text}; it listens on loopback alone")
    text = f"{text}; {len(ports)} of its ports listen for other machines, too"
    if os.environ.get("RAY_AUTH_MODE", "token") == "token":
        return Finding(Level.OK, "ray", f"{text}, and ask for Ray's token")
    return Finding(Level.WARN, "ray", f"{text}, and let everybody in", "unset RAY_AUTH_MODE")
