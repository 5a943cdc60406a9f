"""What the doctor finds without starting anything."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ma_cluster.report.doctor import Level, port_free, private, reachable, shared_memory


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """With a token for its user alone."""
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.touch(0o600)
    return tmp_path


def test_a_token_or_a_session_that_others_can_read_is_told(home: Path, tmp_path: Path) -> None:
    ray_files, token = tmp_path / "ray", home / ".ray" / "auth_token"
    assert private(ray_files, lambda: home).level is Level.OK
    session = ray_files / "session_2026-11-27"
    session.mkdir(0o700, parents=True)
    assert private(ray_files, lambda: home).level is Level.OK
    session.chmod(0o755)
    assert "1 sessions under" in private(ray_files, lambda: home).cure
    token.chmod(0o640)
    assert private(ray_files, lambda: home).cure.startswith(f"chmod 600 {token}; set RAY_TMPDIR")


def test_a_user_without_a_home_is_no_fault(tmp_path: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    assert private(tmp_path, homeless).level is Level.OK


def test_little_shared_memory_is_told_and_none_is_no_fault(tmp_path: Path) -> None:
    assert shared_memory(tmp_path / "none").level is Level.OK
    assert shared_memory(Path("/proc")).level is Level.WARN, "it has no room at all"


def test_a_port_in_use_is_told_with_its_cure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = port_free(port, "the HTTP service")
    assert found.level is Level.WARN and f"port {port} of 127.0.0.1 is in use: end what listens" in found.cure
    assert port_free(port, "the HTTP service").level is Level.OK


def test_what_other_machines_can_reach_of_ray_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert "loopback alone" in reachable("2", []).text
    assert (reachable("2", [1, 2]).level, "2 of its ports" in reachable("2", [1, 2]).text) == (Level.OK, True)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert (reachable("2", []).level, reachable("2", [1]).level) == (Level.OK, Level.WARN)
