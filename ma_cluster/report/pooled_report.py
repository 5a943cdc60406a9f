"""Evaluations that are pooled, and compared with another model's: table.json and table.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ma_cluster.errors import ObjectMissingError, UsageError
from ma_cluster.evaluation.figures import called_figures, healthy_figures, table_figures
from ma_cluster.evaluation.pooling import PHOTOGRAPHS, decode_photographs, paired_differences, pool
from ma_cluster.evaluation.tally import Tally
from ma_cluster.report.evaluation_report import (
    BOOTSTRAP,
    CONVENTIONS,
    apart,
    called_markdown,
    healthy_markdown,
    made,
    rows_markdown,
)
from ma_cluster.storage.store import Store


def pooled_tally(stores: Iterable[Store]) -> Tally:
    """All photographs of some evaluations, without their examples.

    Raises:
        UsageError: a photograph is in two of them, or one is of an older version, which kept no photographs.
        StoreError: they cannot be read.
    """
    photographs = []
    for store in stores:
        try:
            photographs += decode_photographs(store.get(PHOTOGRAPHS))
        except ObjectMissingError:
            text = (
                f"{store.url} holds no {PHOTOGRAPHS}: it is no evaluation, or one of an older version; evaluate again"
            )
            raise UsageError(text) from None
    return pool(photographs)


def pooled_table(ours: Tally, theirs: Tally | None) -> dict[str, Any]:
    """The figures of pooled evaluations, and beside them how much better they are than others' of the same photographs.

    Raises:
        UsageError: no photograph has a lesion, or the others are of other photographs.
    """
    return {
        **apart(table_figures(ours, {})),
        "images": sum(bool(photograph.pixels) for photograph in ours.photographs),
        "called": called_figures(ours),
        "healthy": healthy_figures(ours),
        "left_out": {},
        "against": [] if theirs is None else paired_differences(ours, theirs),
        "bootstrap": BOOTSTRAP,
        "conventions": CONVENTIONS,
        **made(),
    }


def write_pooled(out: Store, values: Mapping[str, Any]) -> None:
    """table.md, then table.json.

    Raises:
        StoreError: the destination cannot be written.
    """
    out.put("table.md", ("\n".join(pooled_markdown(values)) + "\n").encode())
    out.put("table.json", (json.dumps(values, indent=2) + "\n").encode())


def pooled_markdown(values: Mapping[str, Any]) -> Iterable[str]:
    """The lines of a pooled table.md."""
    yield f"# {values['images']} photographs of pooled evaluations"
    yield ""
    yield from rows_markdown(values)
    yield ""
    yield from called_markdown(values)
    yield from healthy_markdown(values)
    if values["against"]:
        yield ""
        yield "| row | figure | these | those compared with | 95 % interval of the difference | better |"
        yield "|---|---|---|---|---|---|"
    for each in values["against"]:
        bounds = f"{each['ci_low']:+.3f} to {each['ci_high']:+.3f}"
        cells = [each["row"], each["figure"], f"{each['ours']:.3f}", f"{each['theirs']:.3f}", bounds, each["better"]]
        yield f"| {' | '.join(cells)} |"
