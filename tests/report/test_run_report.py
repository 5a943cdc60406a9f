"""A run as a page, and its masks against reference masks: pixels and lesions, counted."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from photographs import encode, noise_photograph

from ma_cluster.archive.outcomes import Outcome
from ma_cluster.archive.plan import read_shard
from ma_cluster.archive.run import begin_run, commit, pending
from ma_cluster.archive.summary import finish_run, open_run, read_status
from ma_cluster.errors import Flag, Reason, Triage, UsageError
from ma_cluster.images.fundus import Fov
from ma_cluster.images.quality import Quality
from ma_cluster.images.reading import Facts
from ma_cluster.lesions.findings import Findings, Lesion
from ma_cluster.report.console import status_lines, summary_lines
from ma_cluster.report.run_report import Digest, throughput, write_report
from ma_cluster.storage.local import LocalStore

HOSTILE = '<script>alert(1)</script>"onerror=x'
QUALITY = Quality(0.4, 0.1, 0.08, 0.02, 0.2, 0.9, True, (Flag.FIELD_ASSUMED,))
FACTS = Facts(100, 120, Fov(50.0, 60.0, 90.0), QUALITY, {})
LESION = Lesion(1, 5.0, 6.0, (4, 5, 7, 8), 9, 3.4, 0.9, 0.5, 0.9, 40.0)


ROW = {"status": "scored", "lesion_count": 0, "image_score": None, "gradable": True, "quality": 0.8}


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def committed_run(root: Path) -> Path:
    """Two photographs with 3 and 7 lesions and one that was refused, whose key is HTML."""
    source, dest = root / "source", root / "dest"
    source.mkdir()
    for name in ("a b.jpg", "c.jpg", HOSTILE.replace("/", ":")):
        (source / name).write_bytes(b"x")
    store = LocalStore(dest)
    dest.mkdir()
    run = begin_run(LocalStore(source), store, "m" * 64, "c" * 64)
    for shard in pending(store, run):
        outcomes = []
        for entry in read_shard(store, shard):
            if "script" in entry.key:
                outcomes.append(Outcome(key=entry.key, etag=entry.etag, reason=Reason.NOT_AN_IMAGE, attempts=1))
                continue
            lesions = (LESION,) * (3 if entry.key == "a b.jpg" else 7)
            keys = {"mask_key": f"masks/{entry.key}.png", "overlay_key": f"overlays/{entry.key}"}
            scored = {
                "attempts": 1,
                "facts": FACTS,
                "findings": Findings(lesions, 0.625, Triage.REFER),
                "seconds": {"hgn": 2.0},
            }
            outcomes.append(Outcome(key=entry.key, etag=entry.etag, reason=None, **scored, **keys))
        commit(store, run, shard, outcomes)
    store.put("overlays/c.jpg", encode(noise_photograph((120, 100)), "JPEG"))
    return dest


def test_the_page_shows_counts_reasons_and_the_overlays_with_most_lesions_first(tmp_path: Path) -> None:
    dest = committed_run(tmp_path)
    assert write_report(str(dest)) == f"{dest}/report/index.html"
    page = Page((dest / "report/index.html").read_text())
    pictures = [kept["src"] or "" for tag, kept in page.tags if tag == "img"]
    assert len(pictures) == 1  # the other overlay is gone
    assert pictures[0].startswith("data:image/jpeg;base64,")
    assert "not_an_image" in page.texts
    assert "4.0 s" in page.texts
    shown = [text for text in page.texts if text in ("3 lesions", "7 lesions")]
    assert shown == ["7 lesions", "3 lesions"]
    assert page.texts.count("to refer, 0.62") == 2
    assert "for a thousand photographs" not in " ".join(page.texts)
    assert write_report(str(dest), price=2.0)  # again, over the first


def test_the_page_is_one_file_that_loads_and_runs_nothing(tmp_path: Path) -> None:
    dest = committed_run(tmp_path)
    write_report(str(dest))
    text = (dest / "report/index.html").read_text()
    page = Page(text)
    assert not [kept for _, kept in page.tags if "style" in kept or "onclick" in kept]
    links = [value or "" for _, kept in page.tags for name, value in kept.items() if name in ("href", "src")]
    assert all(link.startswith("data:") for link in links)
    (policy,) = [kept["content"] for tag, kept in page.tags if kept.get("http-equiv") == "Content-Security-Policy"]
    style = text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"


def test_photographs_are_counted_by_the_time_at_which_they_were_committed() -> None:
    commits = [(1e9 + minute * 60, number) for minute, number in ((0, 3), (1, 5), (9, 2))]
    assert [bar.value for bar in throughput(commits)] == ["8", "0", "2"]
    assert throughput(commits[:1]) == []


def test_a_finished_run_is_told_with_the_time_of_each_stage(tmp_path: Path) -> None:
    dest = LocalStore(committed_run(tmp_path))
    summary = finish_run(dest, open_run(dest.url)[1])
    lines = list(summary_lines(summary, images_per_second=0.5))
    assert summary.counts.triage == read_status(dest.url).counts.triage == {"refer": 2}
    assert "  triage   none 0, refer 2, ungradable 0" in lines
    assert lines[0].endswith("3 photographs, 10 lesions")
    assert any(line.startswith("0.50 photographs/s") for line in lines)
    assert [line.split() for line in lines if "hgn" in line] == [["hgn", "4.0", "s", "100%"]]


def test_a_key_is_text_whatever_it_holds(tmp_path: Path) -> None:
    dest = committed_run(tmp_path)
    write_report(str(dest))
    page = Page((dest / "report/index.html").read_text())
    assert HOSTILE.replace("/", ":") in page.texts
    assert [tag for tag, _ in page.tags if tag == "script"] == []
    assert [kept for _, kept in page.tags if "onerror" in kept] == []


def test_lesions_are_counted_in_bins() -> None:
    digest = Digest()
    for lesions in (0, 0, 1, 4, 5, 9, 10, 99, 100, 400):
        digest.add(ROW | {"lesion_count": lesions})
    digest.add(ROW | {"gradable": False, "quality": 0.3})
    bars = {bar.label: bar.value for bar in digest.lesion_bars()}
    assert bars == {
        "0": "2", "1": "1", "2": "0", "3 to 4": "1", "5 to 9": "2", "10 to 19": "1", "20 to 49": "0", "50 to 99": "1",
        "100 or more": "2",
    }  # fmt: skip


def test_an_ungradable_photograph_is_never_counted_as_clean(tmp_path: Path) -> None:
    source, dest = LocalStore(tmp_path / "source"), LocalStore(tmp_path / "dest")
    for name in ("clean.jpg", "dark.jpg", "blurred.jpg"):
        source.put(name, b"x")
    run = begin_run(source, dest, "m" * 64, "c" * 64)
    qualities = {
        "dark.jpg": replace(QUALITY, gradable=False, score=0.3, flags=(Flag.DARK,)),
        "blurred.jpg": replace(QUALITY, gradable=False, score=0.2, flags=(Flag.BLURRED,)),
    }
    for shard in pending(dest, run):
        (entry,) = read_shard(dest, shard)
        quality = qualities.get(entry.key, QUALITY)
        known = {"attempts": 1, "facts": replace(FACTS, quality=quality), "detail": quality.detail}
        known["findings"] = Findings((), None, Triage.NONE if quality.gradable else Triage.UNGRADABLE)
        keys = {"mask_key": f"masks/{entry.key}.png", "overlay_key": f"overlays/{entry.key}"}
        commit(dest, run, shard, [Outcome(key=entry.key, etag=entry.etag, reason=None, **known, **keys)])
    lines = [*status_lines(read_status(dest.url)), *summary_lines(finish_run(dest, run), None)]
    wanted = ["  clean 1: gradable, and without lesions", "  flags blurred 1, dark 1, field_assumed 1"]
    wanted += ["  ungradable 2: the lack of lesions on them means nothing"]
    assert all(lines.count(line) == 2 for line in wanted)
    write_report(dest.url)
    page = Page((dest.root / "report/index.html").read_text())
    keys = [text for text in page.texts if text.endswith(".jpg")]
    assert keys[-2:] == ["blurred.jpg", "dark.jpg"]
    values = read_status(dest.url).to_json()
    assert (values["clean"], values["ungradable"], values["flags"]["dark"]) == (1, 2, 1)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run"):
        write_report(str(tmp_path))
