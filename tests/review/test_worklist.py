"""The worklist's index: orders, filters, walks that nothing disturbs, however many rows."""

from __future__ import annotations

import resource
import unicodedata
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from photographs import encode
from review_runs import commit_run, dotted, small_run

from ma_cluster.archive.outcomes import SCHEMA
from ma_cluster.archive.run import outcomes_key, read_run
from ma_cluster.errors import ObjectMissingError, PartDamagedError, StoreError, UsageError
from ma_cluster.review.events import Event, Kind, append
from ma_cluster.review.worklist import COLUMNS, Query, Worklist
from ma_cluster.storage.store import Store


@contextmanager
def worklists(dest: Store, count: int = 1) -> Iterator[list[Worklist]]:
    """So many indices of a run that have followed it."""
    run = read_run(dest)
    assert run is not None
    found = [Worklist(dest, run) for _ in range(count)]
    try:
        for each in found:
            each.follow()
        yield found
    finally:
        for each in found:
            each.close()


def done(found: Worklist, key: str, reviewer: str = "ada", number: int = 1) -> Event:
    stamp = f"20261127T1200{number:02d}.000Z"
    return Event(id=f"{number:016x}", at=stamp, reviewer=reviewer, run=found.run.id, key=key, kind=Kind.DONE)


def keys(found: Worklist, query: Query, start: int = 0, count: int = 100) -> list[str]:
    return [row["key"] for row in found.page(query, start, count).rows]


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worklist]:
    """eye-0 .. eye-3 with 2, 4, 6, 8 lesions; the last two are to be referred; and one that was refused."""
    found = {}
    for number in range(4):
        pixels, mask = dotted(500, 2 * number + 2, number)
        found[f"left/eye-{number}.jpg"] = (encode(pixels, "JPEG"), mask)
    found["right/100%_black.jpg"] = (b"black", None)
    with worklists(commit_run(tmp_path_factory.mktemp("eyes"), found)) as (index,):
        yield index


def test_the_worst_come_first_and_what_was_not_scored_last(eyes: Worklist) -> None:
    assert keys(eyes, Query()) == [*(f"left/eye-{number}.jpg" for number in (3, 2, 1, 0)), "right/100%_black.jpg"]
    assert keys(eyes, Query(sort="lesions", descending=False))[:2] == ["left/eye-0.jpg", "left/eye-1.jpg"]
    assert keys(eyes, Query(sort="key", descending=True))[0] == "right/100%_black.jpg"


def test_photographs_are_filtered_by_triage_and_by_a_part_of_their_key(eyes: Worklist) -> None:
    assert keys(eyes, Query(triage="refer")) == ["left/eye-3.jpg", "left/eye-2.jpg"]
    assert keys(eyes, Query(triage="unscored")) == ["right/100%_black.jpg"]
    assert keys(eyes, Query(text="100%_")) == ["right/100%_black.jpg"]
    assert keys(eyes, Query(text="EYE-1")) == ["left/eye-1.jpg"]
    assert eyes.counts("ada")["triage"] == {"refer": 2, "none": 2, "unscored": 1}
    assert keys(eyes, Query(flag="dark' OR 1=1 --")) == []


def test_pages_of_a_walk_are_the_whole_in_order(eyes: Worklist) -> None:
    pages = [eyes.page(Query(), start, 2) for start in (0, 2, 4)]
    assert [row["key"] for page in pages for row in page.rows] == keys(eyes, Query())
    assert {page.total for page in pages} == {5}


def test_an_order_or_a_moment_that_is_none_is_refused(eyes: Worklist) -> None:
    moments = [Query(as_of=as_of) for as_of in ("x", "1", f"{2**64}.0", "1." + 5000 * "9")]
    kinds = Query(triage="urgent"), Query(triage="all"), Query(state="all", reviewer="ada")
    for wrong in (Query(sort="key; DROP TABLE photographs"), *kinds, *moments):
        with pytest.raises(UsageError):
            eyes.page(wrong, 0, 1)


def test_a_photograph_has_all_of_its_outcome(eyes: Worklist) -> None:
    row = eyes.page(Query(), 0, 1).rows[0]
    outcome = eyes.outcome(row["id"])
    assert (outcome["key"], len(outcome["lesions"])) == ("left/eye-3.jpg", 8)
    with pytest.raises(ObjectMissingError):
        eyes.outcome("0" * 16)


def test_a_walk_through_what_is_to_do_is_not_shortened_by_what_gets_done(tmp_path: Path) -> None:
    with worklists(small_run(tmp_path, 4, 300)) as (found,):
        wanted = Query(state="todo", reviewer="ada")
        first = found.page(wanted, 0, 2)
        found.note([done(found, row["key"], number=number) for number, row in enumerate(first.rows, 1)])
        later = Query(state="todo", reviewer="ada", as_of=first.as_of)
        assert keys(found, later, 2, 2) == ["eye-1.jpg", "eye-0.jpg"]
        assert keys(found, wanted) == ["eye-1.jpg", "eye-0.jpg"]
        assert keys(found, Query(state="done", reviewer="ada")) == ["eye-3.jpg", "eye-2.jpg"]
        assert len(keys(found, Query(state="todo", reviewer="bob"))) == 4


def test_a_walk_through_what_is_done_is_not_shortened_by_what_is_said_of_it_again(tmp_path: Path) -> None:
    with worklists(small_run(tmp_path, 4, 300)) as (found,):
        found.note([done(found, f"eye-{number}.jpg", number=number + 1) for number in range(4)])
        first = found.page(Query(state="done", reviewer="ada"), 0, 2)
        said = [done(found, row["key"], number=number) for number, row in enumerate(first.rows, 10)]
        found.note([event.model_copy(update={"kind": Kind.NOTE, "note": "seen"}) for event in said])
        later = Query(state="done", reviewer="ada", as_of=first.as_of)
        assert keys(found, later, 2, 2) == ["eye-1.jpg", "eye-0.jpg"]


def test_events_of_other_servers_are_followed(tmp_path: Path) -> None:
    dest = small_run(tmp_path, 2, 300)
    with worklists(dest, 2) as (found, other):
        event = done(found, "eye-1.jpg")
        append(dest, event)
        found.note([event])
        found.follow()
        assert other.since(0) == ([], 0)
        other.follow()
        assert other.since(0) == found.since(0) == ([other.id_of("eye-1.jpg")], 1)
        assert other.page(Query(reviewer="ada"), 0, 1).rows[0]["done"]
        assert not other.page(Query(reviewer="bob"), 0, 1).rows[0]["done"]
        assert other.counts("bob")["reviewers"] == {"ada": 1}


class Failing:
    """A store that does not give one object."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self.key = store, key

    def get(self, key: str, **options: Any) -> bytes:
        if key == self.key:
            raise StoreError("the store does not answer")
        return self._store.get(key, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_no_event_is_lost_where_the_store_fails_after_it(tmp_path: Path) -> None:
    dest = small_run(tmp_path, 2, 300)
    run = read_run(dest)
    assert run is not None
    failing = Failing(dest, "")
    with closing(Worklist(failing, run)) as found:
        events = [done(found, f"eye-{number}.jpg", number=number) for number in (0, 1)]
        for event in events:
            append(dest, event)
        failing.key = events[1].object_key
        with pytest.raises(StoreError):
            found.follow()
        failing.key = ""
        found.follow()
        assert found.since(0) == ([found.id_of(f"eye-{number}.jpg") for number in (0, 1)], 2)


def test_a_damaged_part_hides_no_decision_and_is_taken_in_once_it_is_whole(tmp_path: Path) -> None:
    dest = small_run(tmp_path, 2, 300)
    whole = dest.get(outcomes_key(0))
    dest.put(outcomes_key(0), b"damaged")
    run = read_run(dest)
    assert run is not None
    with closing(Worklist(dest, run)) as found:
        append(dest, done(found, "eye-1.jpg"))
        with pytest.raises(PartDamagedError):
            found.follow()
        assert found.since(0)[1] == 1
        dest.put(outcomes_key(0), whole)
        found.follow()
        assert keys(found, Query(state="done", reviewer="ada")) == ["eye-1.jpg"]


def test_a_full_disk_takes_nothing_away_once_there_is_room(tmp_path: Path) -> None:
    dest = small_run(tmp_path, 3, 300)
    run = read_run(dest)
    assert run is not None
    with closing(Worklist(dest, run)) as found:
        events = [done(found, f"{'x' * 3000}-{number}", number=number) for number in range(20)]
        for event in events:
            append(dest, event)
        (least,) = found._index.execute("PRAGMA page_count").fetchone()
        for room in (0, 5):
            found._index.execute(f"PRAGMA max_page_count = {least + room}")
            with pytest.raises(StoreError, match="free some space"):
                found.follow()
        found._index.execute("PRAGMA max_page_count = 100000")
        found.follow()
        assert found.page(Query(), 0, 1).total == 3
        assert found.since(0)[1] == len(events)


def test_a_part_of_a_key_is_found_however_its_letters_are_written(tmp_path: Path) -> None:
    pixels, mask = dotted(300, 2)
    name = unicodedata.normalize("NFD", "Ä/Gérôme-Ж.jpg")
    with worklists(commit_run(tmp_path, {name: (encode(pixels, "JPEG"), mask)})) as (found,):
        for text in ("ä/gérô", "ÔME-ж", unicodedata.normalize("NFD", "GÉR")):
            assert keys(found, Query(text=text)) == [name]
        assert keys(found, Query(text="gerome")) == []


def test_the_visit_before_of_the_same_eye_is_found(tmp_path: Path) -> None:
    visits = [
        ("p1", "R", "2024-01-05"),
        ("p1", "R", "2025-02-01"),
        ("p1", "L", "2025-06-01"),
        ("p2", "R", "2025-03-01"),
    ]
    visits += [("p1", "R", "2026-03-01"), ("p1", None, "2026-04-01")]
    visits += [("p3", "R", "visit 2"), ("p3", "R", "visit 10"), ("p1", "R", "2024-winter")]
    blank = dict.fromkeys(COLUMNS) | {"status": "scored", "flags": [], "triage": "none"}
    rows = [
        blank | {"key": f"{number}.jpg", "patient": patient, "eye": eye, "visit": visit}
        for number, (patient, eye, visit) in enumerate(visits)
    ]
    with worklists(small_run(tmp_path, 1, 300)) as (found,):
        found._add([dict(row) for row in rows], 0, 9)
        before = [found.previous(row) for row in rows]
        assert before == [None, found.id_of("0.jpg"), None, None, found.id_of("1.jpg"), *[None] * 4], (
            "no order of labels"
        )
        assert keys(found, Query(sort="visit", descending=False))[:5] == ["0.jpg", "8.jpg", "1.jpg", "2.jpg", "4.jpg"]


@pytest.mark.slow
def test_a_hundred_thousand_rows_are_paged_in_little_memory(tmp_path: Path) -> None:
    """The index is on disk: beside some hundred parts it takes a few megabytes."""
    dest = small_run(tmp_path, 1, 300)
    with worklists(dest) as (found,):
        rng, before = np.random.default_rng(0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for part in range(100):
            rows = {name: [None] * 1000 for name in SCHEMA.names}
            rows |= {"key": [f"site/{part}/eye-{number}.jpg" for number in range(1000)], "status": ["scored"] * 1000}
            rows |= {"image_score": rng.random(1000).tolist(), "lesion_count": rng.integers(0, 50, 1000).tolist()}
            rows |= {"triage": rng.choice(["none", "refer"], 1000).tolist(), "flags": [[]] * 1000}
            found._add(pa.Table.from_pydict(rows, schema=SCHEMA).to_pylist(), 0, 10_000 + part)
        assert found.page(Query(), 0, 1).total == 100_001
        scores = [row["image_score"] for row in found.page(Query(sort="score"), 70_000, 100).rows]
        assert scores == sorted(scores, reverse=True)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 2**10  # KiB
