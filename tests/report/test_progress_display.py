"""What a long command shows of itself on a terminal."""

from __future__ import annotations

import io
import logging

from rich.console import Console

from ma_cluster.report.console import progress_display


def test_what_a_command_is_about_stands_beside_the_bar_and_warnings_stay_above_it() -> None:
    shown, logger = io.StringIO(), logging.getLogger("ma_cluster")
    level, handlers = logger.level, logger.handlers
    logger.setLevel(logging.INFO)
    with progress_display(Console(file=shown, force_terminal=True, width=100)):
        logger.info("starting Ray")
        logger.warning("waiting: no room for [Segmenter]")
    logger.setLevel(level)
    assert logger.handlers is handlers
    before_the_bar_is_wiped = shown.getvalue().split("\r")
    assert any("starting Ray" in line for line in before_the_bar_is_wiped)
    assert "waiting: no room for [Segmenter]\n" in shown.getvalue()
