"""The page of a report: whole, closed to the network, and safe with whatever is in it."""

import subprocess
import sys
from html.parser import HTMLParser

import pytest

from netflow import report_page, shapes
from netflow.report import Facts, Part
from netflow.when import HOUR, SECOND
from netflow.wire import Gap, Header, Trailer

pytestmark = pytest.mark.unit

T0 = 1_772_334_000 * SECOND
HOSTILE = "</title><script>alert(1)</script>&\"'<img src=//x.example/y>"


def facts(name=HOSTILE, gaps=(), **rows):
    header = Header(columns=[], since=T0, until=T0 + 24 * HOUR, as_of=T0, gaps=list(gaps))
    made = {
        "series": shapes.SERIES,
        "sums": shapes.top("slice", False),
        "peers": shapes.top("peer", False),
        "ports": shapes.top("port", False),
        "scans": shapes.SCANS,
        "spoofed": shapes.SPOOFED,
        "coverage": shapes.COVERAGE,
    }
    total = {"step": HOUR, "bytes": 200, "packets": 2, "flows": 1, "attributed_bytes": 150}
    parts = {
        key: Part(shape, header, rows.get(key, []), Trailer(rows=0, total=total))
        for key, shape in made.items()
    }
    return Facts(name, header, parts)


class Page(HTMLParser):
    """Which elements and attributes a page has, and its texts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


SUMS = {"out_bytes": 1500, "in_bytes": 7, "out_packets": 3, "in_packets": 2, "flows": 1}


def full():
    return facts(
        gaps=[Gap(since=T0, until=T0 + HOUR, what="not-running", note=HOSTILE)],
        series=[{"start": "2026-03-01T05:00:00.000000000Z", **SUMS, "begun": 9}],
        sums=[{"slice": HOSTILE, "xid": 256, **SUMS}],
        peers=[{"peer": "198.51.100.7", **SUMS}],
        ports=[{"proto": "tcp", "port": 443, **SUMS}],
        coverage=[
            {"start": "x", "what": "slice", "begun": 1, "packets": 2, "bytes": 150, "seconds": 0},
            {"start": "x", "what": "gap", "begun": 0, "packets": 0, "bytes": 0, "seconds": 3600},
        ],
    )


def test_a_page_has_whole_tags_and_says_what_it_was_given():
    page = Page(report_page.page(full()))
    assert page.open == []
    text = " ".join(page.texts)
    for said in ("Sent 1.5kB in 3 packets", "198.51.100.7", "443", "75.0%", "no collector ran"):
        assert said in text
    assert page.tags.count("svg") == 1


def test_a_page_loads_nothing_and_runs_nothing():
    text = report_page.page(full())
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "embed", "image"} & set(page.tags)
    for _tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#")
        if "url(" in (value or ""):
            assert "url(#" in value
    assert "@import" not in text
    assert ("meta", "http-equiv", "Content-Security-Policy") in page.attributes


def test_a_hostile_name_is_text():
    page = Page(report_page.page(full()))
    assert any(HOSTILE in text for text in page.texts)


def test_a_slice_without_records_and_gaps_is_said_to_be_so():
    text = " ".join(Page(report_page.page(facts("quiet"))).texts)
    assert "There is no record of this slice" in text
    assert "No gap touches this period" in text


def test_a_report_without_matplotlib_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from netflow.report_plot import rates\n"
        "rates([], 60 * 10**9, 0, 10**12, [], False)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "PlotError" in done.stderr
    assert "vnet[report]" in done.stderr
