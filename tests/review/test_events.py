"""Decisions as events: what follows from them, and that none is lost or overwritten."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ma_cluster.review.events import GRADES, Event, Kind, Standing, append, read_events, standing
from ma_cluster.storage.local import LocalStore

PAGE = Path(__file__).parents[2] / "ma_cluster/review/page"
SQUARE = [(1.0, 1.0), (1.0, 5.0), (5.0, 5.0), (5.0, 1.0)]


def event(number: int, kind: str, reviewer: str = "ada", **said: Any) -> Event:
    """The event of a second; its id is its number."""
    stamp = f"20261127T1200{number:02d}.000Z"
    return Event(id=f"{number:016x}", at=stamp, reviewer=reviewer, run="r", key="eye.jpg", kind=Kind(kind), **said)


def test_the_last_verdict_grade_and_note_count() -> None:
    said = [
        event(1, "accept", lesion=1), event(2, "reject", lesion=2), event(3, "reject", lesion=1),
        event(4, "grade", grade="mild"), event(5, "grade", grade="none"), event(6, "note", note="haze"),
        event(7, "draw", polygon=SQUARE), event(8, "done"),
    ]  # fmt: skip
    assert standing(said) == Standing({1: False, 2: False}, {f"{7:016x}": SQUARE}, "none", "haze", True)


def test_undoing_a_verdict_brings_back_the_one_before() -> None:
    said = [event(1, "accept", lesion=1), event(2, "reject", lesion=1), event(3, "undo", undoes=f"{2:016x}")]
    assert standing(said).verdicts == {1: True}
    assert standing([*said, event(4, "undo", undoes=f"{1:016x}")]).empty


@given(st.permutations(range(6)))
def test_the_order_in_which_events_arrive_does_not_matter(order: list[int]) -> None:
    said = [event(1, "accept", lesion=1), event(2, "reject", lesion=1), event(3, "draw", polygon=SQUARE)]
    said += [event(4, "undo", undoes=f"{3:016x}"), event(5, "grade", grade="severe"), event(6, "done")]
    assert standing(said[place] for place in order) == standing(said)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "accept"},
        {"kind": "accept", "lesion": 0},
        {"kind": "accept", "lesion": 1, "note": "x"},
        {"kind": "grade", "grade": "5"},
        {"kind": "draw", "polygon": [(1, 1), (2, 2)]},
        {"kind": "draw", "polygon": [(1, 1), (2, 2), (float("nan"), 1)]},
        {"kind": "done", "at": "yesterday"},
        {"kind": "done", "reviewer": "../ada"},
        {"kind": "done", "id": "x"},
    ],
)
def test_what_is_no_event_is_refused(wrong: dict[str, Any]) -> None:
    right = {"id": "0" * 16, "at": "20261127T120000.000Z", "reviewer": "ada", "run": "r", "key": "k"}
    with pytest.raises(ValidationError):
        Event.model_validate(right | wrong)


def test_events_of_two_reviewers_lie_beside_each_other_and_sending_twice_keeps_one(tmp_path: Path) -> None:
    dest = LocalStore(tmp_path)
    said = [event(1, "done"), event(1, "done", "bob"), event(2, "grade", grade="mild")]
    assert [append(dest, each) for each in (*said, said[0])] == [True, True, True, False]
    known: set[str] = set()
    assert sorted(read_events(dest, "r", known), key=lambda each: each.object_key) == sorted(
        said, key=lambda each: each.object_key
    )
    assert list(read_events(dest, "r", known)) == []
    append(dest, later := event(3, "done"))
    assert list(read_events(dest, "r", known)) == [later]
    assert list(read_events(dest, "another run")) == []


def test_what_is_no_event_and_what_lies_under_anothers_name_is_passed_over(
    tmp_path: Path, log_lines: list[str]
) -> None:
    dest = LocalStore(tmp_path)
    append(dest, right := event(1, "done"))
    dest.put("reviews/ada/notes.txt", b"buy milk")
    dest.put(right.object_key.replace("ada", "bob"), dest.get(right.object_key))
    dest.put(event(2, "done").object_key, b"{")
    assert list(read_events(dest, "r")) == [right]
    (line,) = log_lines
    assert "3 objects" in line and "milk" not in line


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_page_draws_the_same_conclusions(tmp_path: Path) -> None:
    """Random events, through `standing` of the page and of this package."""
    rng, said = random.Random(7), []
    for number in range(1, 50):
        kind = rng.choice(list(Kind))
        words: dict[Kind, dict[str, Any]] = {
            Kind.ACCEPT: {"lesion": rng.randint(1, 4)}, Kind.REJECT: {"lesion": rng.randint(1, 4)},
            Kind.DRAW: {"polygon": SQUARE}, Kind.GRADE: {"grade": rng.choice(GRADES)}, Kind.NOTE: {"note": str(number)},
            Kind.UNDO: {"undoes": f"{rng.randint(1, number):016x}"},
        }  # fmt: skip
        said.append(event(number, kind, **words.get(kind, {})))
    source = re.sub(r"^import .*$", "", (PAGE / "decisions.js").read_text(), flags=re.MULTILINE)
    events = "[" + ",".join(each.model_dump_json(exclude_none=True) for each in said) + "]"
    source += f"""
    globalThis.addEventListener = () => {{}};
    const found = standing({events}, "ada");
    const words = {{ verdicts: [...found.verdicts], drawn: [...found.drawn.keys()], grade: found.grade,
      note: found.note, done: found.done }};
    console.log(JSON.stringify(words));
    """
    (tmp_path / "page.mjs").write_text(source)
    done = subprocess.run(["node", tmp_path / "page.mjs"], capture_output=True, text=True, check=True)
    own = standing(said)
    verdicts = {lesion: kind == "accept" for lesion, kind in json.loads(done.stdout)["verdicts"]}
    told = json.loads(done.stdout)
    assert (verdicts, told["drawn"]) == (own.verdicts, list(own.drawn))
    assert (told["grade"], told["note"], told["done"]) == (own.grade, own.note, own.done)
