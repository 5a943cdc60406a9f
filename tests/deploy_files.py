"""What deploy/ says of monitoring, as tests look at it: dashboards, rules, and the metrics that their PromQL names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARDS = sorted((DEPLOY / "grafana").glob("*.json"))
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
_WORDS = {"by", "on", "and", "or", "unless", "group_left", "group_right", "without", "ignoring", "bool", "offset"}


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and where it stands."""

    where: str
    expr: str

    @property
    def metrics(self) -> set[str]:
        """The metrics that it reads, those of recording rules among them."""
        bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", self.expr)
        bare = re.sub(r"\b(by|on|group_left|group_right|without|ignoring)\s*\([^)]*\)", " ", bare)
        names = re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?![a-zA-Z0-9_:]*\s*\()", bare)
        return {name for name in names if name not in _WORDS and not re.fullmatch(r"e\d*|Inf|NaN", name)}


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """The panels of a dashboard that show something."""
    return [panel for panel in json.loads(dashboard.read_text())["panels"] if panel["type"] != "row"]


def panel_queries() -> Iterator[Query]:
    """Of all panels of all dashboards."""
    for dashboard in DASHBOARDS:
        for panel in panels(dashboard):
            yield from (Query(f"{dashboard.stem}: {panel['title']}", target["expr"]) for target in panel["targets"])


def rules() -> list[dict[str, Any]]:
    """All recording and alerting rules."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]
