"""What the pages of reports are made of: one file without scripts, which loads nothing, and charts as inline SVG.

The template escapes all that it shows; its style is allowed by its digest, so that nothing else can style or run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np

_WIDTH, _HEIGHT = 640, 170
"""Of a chart, in the units of its drawing."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a chart: what it counts, how many, and its length over the longest."""

    label: str
    value: str
    share: float


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a whole, as a stretch of a bar of length 1. `kind` names its colour."""

    label: str
    value: str
    kind: str
    start: float
    share: float


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart: its name, its points as SVG has them, and its last value."""

    name: str
    points: str
    last: str


def bars(labels: Sequence[str], values: Sequence[float | int], form: str = "{:,}") -> list[Bar]:
    """Bars in this order."""
    longest = max(values, default=0) or 1
    return [Bar(label, form.format(value), value / longest) for label, value in zip(labels, values, strict=True)]


def parts(counted: Mapping[str, tuple[str, int]]) -> list[Part]:
    """The parts of a whole, by their kind: label and number; those that are empty are left out."""
    whole, start, found = sum(number for _, number in counted.values()) or 1, 0.0, []
    for kind, (label, number) in counted.items():
        if number:
            found.append(Part(label, f"{number:,} ({number / whole:.0%})", kind, start, number / whole))
            start += number / whole
    return found


def lines(steps: Sequence[float], series: Mapping[str, Sequence[float]], top: float | None = None) -> list[Line]:
    """Lines over the same steps, which share a scale from 0 to `top`, or to the largest value."""
    largest = top or max((value for values in series.values() for value in values), default=0.0) or 1.0
    first, last = (steps[0], steps[-1]) if steps else (0.0, 1.0)
    across = np.interp(steps, [first, max(last, first + 1e-9)], [0, _WIDTH])
    found = []
    for name, values in series.items():
        down = _HEIGHT - _HEIGHT * np.asarray(values, float) / largest
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
        found.append(Line(name, points, f"{values[-1]:.4g}" if len(values) else ""))
    return found


def embedded(jpeg: bytes) -> str:
    """A picture as the address of an <img>."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def render(template: str, **values: Any) -> str:
    """A page as HTML."""
    loader = jinja2.PackageLoader("ma_cluster.report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = files("ma_cluster.report").joinpath("templates/report.css").read_text()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    made = {"style": style, "policy": policy, "written": written, "width": _WIDTH, "height": _HEIGHT}
    return str(environment.get_template(template).render(**made, **values))
