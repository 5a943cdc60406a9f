"""Decoding in child processes: real ones, that really die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from decoders import ABORT, EXIT, GROSS, HANG, MEMORY, OTHER, SLEEP
from photographs import encode, noise_photograph
from processes import Process, descendants, wait_until_gone

from ma_cluster.config import ImageConfig
from ma_cluster.errors import ImageFailedError, ImageRefusedError, Reason, SandboxError
from ma_cluster.images.decode import decode
from ma_cluster.images.sandbox import DecodePool, SandboxConfig

IMAGE = ImageConfig()
SANDBOX = SandboxConfig(children=1, deadline_s=2.0, memory_bytes=2**30, decoder="decoders:decode")
GOOD = encode(noise_photograph((300, 401)), "PNG")


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    """One child; whatever it was made to do before, it decodes the next photograph."""
    pool = DecodePool(IMAGE, SANDBOX)
    yield pool
    pool.close()
    assert wait_until_gone(children(), timeout_s=5) == []


def children() -> list[Process]:
    return [process for process in descendants(os.getpid()) if "sandbox_child" in process.title]


def failure(pool: DecodePool, data: bytes) -> ImageFailedError:
    with pytest.raises(ImageFailedError) as failed:
        pool.decode(data)
    return failed.value


def test_pixels_are_those_of_the_decoder(pool: DecodePool) -> None:
    pixels = pool.decode(GOOD).pixels
    np.testing.assert_array_equal(pixels, decode(GOOD, IMAGE).pixels)
    assert pixels.flags.writeable and pixels.flags.c_contiguous


def test_a_refusal_arrives_as_it_was_raised_and_costs_no_child(pool: DecodePool) -> None:
    before = [child.pid for child in children()]
    for data in (b"", b"<html>", GOOD[: len(GOOD) // 2]):
        with pytest.raises(ImageRefusedError) as own:
            decode(data, IMAGE)
        with pytest.raises(ImageRefusedError) as apart:
            pool.decode(data)
        assert (apart.value.reason, apart.value.detail) == (own.value.reason, own.value.detail)
    assert [child.pid for child in children()] == before


@pytest.mark.parametrize(
    ("mark", "reason", "words"),
    [
        (ABORT, Reason.CRASHED_WORKER, "died of SIGABRT"),
        (EXIT, Reason.CRASHED_WORKER, "exited with status 7"),
        (MEMORY, Reason.CRASHED_WORKER, "exited with status 1"),
        (OTHER, Reason.CRASHED_WORKER, "exited with status 1"),
        (GROSS, Reason.CRASHED_WORKER, "exited with status 1"),
        (HANG, Reason.TIMEOUT, "within 2 s"),
        (SLEEP, Reason.TIMEOUT, "within 2 s"),
    ],
)
def test_a_decoder_that_dies_or_hangs_fails_its_photograph_alone(
    pool: DecodePool, mark: bytes, reason: Reason, words: str
) -> None:
    """By exiting, aborting, never returning or taking all memory."""
    error = failure(pool, mark + GOOD)
    assert error.reason is reason
    assert words in error.detail
    assert pool.decode(GOOD).pixels.shape == (300, 401, 3)


@pytest.mark.parametrize(
    ("number", "reason", "words"),
    [(signal.SIGKILL, Reason.CRASHED_WORKER, "died of SIGKILL"), (signal.SIGSTOP, Reason.TIMEOUT, "within 2 s")],
)
def test_a_child_that_is_killed_or_stopped_fails_what_it_holds(
    pool: DecodePool, number: signal.Signals, reason: Reason, words: str
) -> None:
    pool.decode(GOOD)
    (child,) = children()
    timer = threading.Timer(0.5, os.kill, (child.pid, number))
    timer.start()
    error = failure(pool, SLEEP)
    timer.join()
    assert error.reason is reason
    assert words in error.detail
    assert pool.decode(GOOD).pixels.shape == (300, 401, 3)


def test_a_child_that_was_killed_while_idle_is_no_photographs_fault(pool: DecodePool) -> None:
    pool.decode(GOOD)
    killed = children()
    os.kill(killed[0].pid, signal.SIGKILL)
    assert wait_until_gone(killed, timeout_s=5) == []
    assert pool.decode(GOOD).pixels.shape == (300, 401, 3)


def test_nothing_is_left_of_children_that_died(pool: DecodePool) -> None:
    before = open_files()
    for _ in range(5):
        failure(pool, ABORT)
    assert open_files() == before
    pool.decode(GOOD)  # a child that has only just been started has no command line in /proc yet
    assert len(children()) == 1


def test_photographs_beside_a_hanging_one_go_on() -> None:
    pool = DecodePool(IMAGE, replace(SANDBOX, children=2, deadline_s=3.0))
    with ThreadPoolExecutor(2) as threads:
        hanging = threads.submit(failure, pool, SLEEP)
        for _ in range(10):
            pool.decode(GOOD)
        assert not hanging.done()
        assert hanging.result().reason is Reason.TIMEOUT
    pool.close()


def test_a_child_sees_none_of_our_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    pool = DecodePool(IMAGE, SANDBOX)
    titles = [Path(f"/proc/{child.pid}/environ").read_bytes() for child in children()]
    pool.close()
    assert titles and all(b"PYTHONPATH" in title and b"a secret" not in title for title in titles)


@pytest.mark.parametrize("decoder", ["no.such.module:decode", "decoders:nothing"])
def test_a_decoder_that_is_not_there_is_named_at_the_start(decoder: str) -> None:
    with pytest.raises(SandboxError, match=f"{decoder} cannot be loaded"):
        DecodePool(IMAGE, replace(SANDBOX, decoder=decoder))


def test_children_end_with_a_parent_that_is_killed_even_in_an_endless_loop() -> None:
    code = (
        "import sys, decoders\n"
        "from ma_cluster.config import ImageConfig\n"
        "from ma_cluster.images.sandbox import DecodePool, SandboxConfig\n"
        "config = SandboxConfig(children=2, deadline_s=2.0, decoder='decoders:decode')\n"
        "pool = DecodePool(ImageConfig(), config)\n"
        "print('up', flush=True)\n"
        "pool.decode(decoders.HANG)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
        time.sleep(0.3)  # into the loop
        orphans = descendants(parent.pid)
        parent.kill()
    assert len(orphans) == 2
    assert wait_until_gone(orphans, timeout_s=10) == []


@pytest.mark.parametrize(
    "wrong", [{"children": 0}, {"deadline_s": 0.0}, {"memory_bytes": 2**20}, {"decoder": "module.function"}]
)
def test_limits_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"sandbox.{next(iter(wrong))}|sandbox.children"):
        SandboxConfig(**wrong)  # type: ignore[arg-type]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
