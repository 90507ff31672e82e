"""The report page: true to its files, readable without a network, and proof against hostile text."""

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from protocols import PROTOCOLS
from splitfl.charts import COLOURS, Line, chart
from splitfl.config import TuneSettings
from splitfl.errors import DataError, UsageError
from splitfl.metrics import RunLog
from splitfl.options import to_toml
from splitfl.report import (
    as_duration,
    as_number,
    as_size,
    as_value,
    read_run_directory,
    write_demo_report,
    write_report,
)

HOSTILE = "</title><script>alert(1)</script><img src=http://x.example/y>\"'"
PLAN = {"layers": 12, "bottom": 2, "top": 3, "dtype": "float32"}


def train(log, *steps, seconds=2.0):
    for step in steps:
        log.write(
            "train",
            step=step,
            epoch=step / 40,
            loss=4 - step / 50,
            learning_rate=1e-3,
            grad_norm=1.0,
            tokens=1000,
            tokens_per_s=500.0,
            bytes_sent=30_000,
            bytes_received=20_000,
            seconds=seconds,
        )


def evaluate(log, step, when, loss):
    log.write("eval", step=step, when=when, loss=loss, perplexity=math.exp(loss), tokens=99)


def a_run(directory: Path, *, model: str = "gpt2", losses: tuple[float, float] = (4.0, 3.2)) -> Path:
    with RunLog(directory / "run.jsonl") as log:
        log.write("start", model=model, train_rows=120, **PLAN)
        evaluate(log, 0, "before", losses[0])
        train(log, 10, 20)
        evaluate(log, 20, "during", 3.7)
        train(log, 30, 40)
        evaluate(log, 40, "after", losses[1])
        log.write("end", seconds=75.0, peak_rss_bytes=2 * 10**9, bytes_sent=150_000, bytes_received=90_000, steps=40)
    disclosure = PROTOCOLS["split"].disclosure.to_json()
    (directory / "disclosure.json").write_text(json.dumps(disclosure), encoding="utf-8")
    tune = TuneSettings(
        kit=Path("kit"),
        out=directory,
        owner="tcp://127.0.0.1:5555",
        insecure_loopback=True,
        train=Path("rows.jsonl"),
        max_steps=40,
    )
    to_toml(tune, directory / "config.toml")
    return directory


class Page(HTMLParser):
    """The words of a page, and everything in it that could reach outside."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.words, self.ids, self.outside, self.open = "", [], [], []
        self.feed(self.source)
        self.close()
        self.text = " ".join(self.words.split())

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "link", "img", "input", "hr"):
            self.open.append(tag)
        self.outside += [tag] * (tag in ("script", "link", "img", "iframe", "object", "embed", "form", "base"))
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action") and not value.startswith("#"):
                self.outside.append(value)
            if name.startswith("on"):
                self.outside.append(name)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words += data + " "


def closed(page: Page) -> Page:
    """The page, once it has been seen to stand alone."""
    assert page.open == [], "every tag is closed"
    assert page.outside == []
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", page.source)
    assert "default-src 'none'" in page.source
    return page


def test_the_page_says_what_the_files_say(tmp_path):
    path = write_report(a_run(tmp_path / "hospital"))
    assert path == tmp_path / "hospital" / "report.html"
    page = closed(Page(path))
    assert "hospital" in page.text
    assert "not finished" not in page.text
    assert "loss went from 4.000 to 3.200 : it has learned" in page.text
    assert "It took 40 steps and 1 min 15 s." in page.text
    assert "54.60 → 24.53" in page.text, "perplexity"
    assert "Speed 500.0 tokens a second" in page.text
    assert "Sent, in all 150.0 kB 3.0 kB a step" in page.text
    assert "Received, in all 90.0 kB 2.0 kB a step" in page.text
    assert "Peak memory 2.0 GB" in page.text
    assert "2 layers here, 7 at the owner, 3 here" in page.text
    assert "learning_rate 0.0002" in page.text
    assert "owner tcp://127.0.0.1:5555" in page.text
    assert page.source.count("<svg") == 2
    disclosure = PROTOCOLS["split"].disclosure
    assert disclosure.in_plain_words in page.text
    for crossing in disclosure.crossings:
        assert crossing.content in page.text
    for thing in disclosure.never:
        assert thing in page.text


def test_a_loss_that_rose_is_said_to_have_risen(tmp_path):
    page = Page(write_report(a_run(tmp_path, losses=(3.0, 3.5))))
    assert "on those rows it got worse" in page.text
    assert "it has learned" not in page.text


def test_a_run_that_was_resumed_counts_what_it_did_twice(tmp_path):
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write("start", model="gpt2")
        evaluate(log, 0, "before", 4.0)
        train(log, 10, 20, 30, seconds=1.0)
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write("start", model="gpt2", step=20)
        evaluate(log, 20, "before", 3.9)
        train(log, 30, 40, seconds=3.0)
        evaluate(log, 40, "after", 3.1)
        log.write("end", seconds=10.0, peak_rss_bytes=1, bytes_sent=100_000, bytes_received=1, steps=40)
    run = read_run_directory(tmp_path)
    assert [r["step"] for r in run.train] == [10, 20, 30, 40], "the curve shows each step once"
    assert [r["seconds"] for r in run.train] == [1, 1, 3, 3], "and the later time"
    assert run.totals["bytes_sent"] == 3 * 30_000 + 100_000, "but what was sent was sent"
    assert run.totals["seconds"] == 13
    assert run.measured("before")["loss"] == 4.0, "the model as it came"
    assert run.finished


def test_a_run_that_broke_off_says_so(tmp_path):
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write("start")
        evaluate(log, 0, "before", 4.0)
        train(log, 10)
        evaluate(log, 10, "during", 3.5)
    page = closed(Page(write_report(tmp_path)))
    assert "not finished" in page.text
    assert "4.000 → 3.500" in page.text, "the last figure there is"
    assert "no disclosure.json" in page.text.replace("  ", " ")
    assert "Peak memory" not in page.text


def test_a_run_without_held_out_rows_and_one_without_steps(tmp_path):
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write("start")
    assert "No training step has been recorded yet" in closed(Page(write_report(tmp_path))).text
    with RunLog(tmp_path / "run.jsonl") as log:
        train(log, 1)
        log.write("train", step=2, loss=math.nan)
        log.write("end", seconds=1.0, peak_rss_bytes=1, bytes_sent=1, bytes_received=1, steps=2)
    page = closed(Page(write_report(tmp_path)))
    assert "was not measured" in page.text
    assert page.source.count("<svg") == 2, "what is finite is drawn"


def test_accuracy_is_better_when_it_is_higher(tmp_path):
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write("start", task="sequence-classification")
        log.write("eval", step=0, when="before", loss=0.7, accuracy=0.5)
        log.write("eval", step=9, when="after", loss=0.4, accuracy=0.75)
    source = Page(write_report(tmp_path)).source
    assert re.search(r'0\.5000 →</span>\s*<span class="good">0\.7500', source)


def test_hostile_text_stays_text(tmp_path):
    directory = a_run(tmp_path / "r", model=HOSTILE)
    (directory / "config.toml").write_text(f"protocol = '''{HOSTILE}'''\n", encoding="utf-8")
    page = closed(Page(write_report(directory)))
    assert page.text.count("<script>alert(1)</script>") == 2
    demo = closed(Page(write_demo_report(tmp_path / "d", {HOSTILE: HOSTILE}, {HOSTILE: directory, "b": directory})))
    assert "<script>" not in demo.source
    assert demo.text.count("<script>alert(1)</script>") >= 4


def test_several_parties_side_by_side(tmp_path):
    a, b = a_run(tmp_path / "a b"), a_run(tmp_path / "law", losses=(4.0, 4.5))
    write_report(a)
    path = write_demo_report(tmp_path, {"Trunk": "7 layers", "Sessions": 2}, {"hospital": a, "law firm": b})
    page = Page(path)
    assert page.outside == ["a%20b/report.html"], "only to the page that is there"
    assert "2 parties, one owner" in page.text
    assert "the loss fell for 1 of 2" in page.text
    assert "hospital 4.000 → 3.200" in page.text
    assert "law firm 4.000 → 4.500" in page.text
    assert "Trunk 7 layers" in page.text
    assert page.source.count("<svg") == 3
    assert len(page.ids) == len(set(page.ids))


def test_damaged_files_are_named(tmp_path):
    directory = a_run(tmp_path)
    (directory / "disclosure.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"disclosure\.json"):
        write_report(directory)
    with pytest.raises(DataError, match=r"run\.jsonl"):
        write_report(tmp_path / "nowhere")
    assert not (directory / "report.html").exists()


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_the_extra_the_error_says_what_to_install(tmp_path, monkeypatch, package):
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=package) as refused:
        write_report(a_run(tmp_path))
    assert refused.value.hint == "pip install 'splitfl[report]'"


def test_more_lines_than_colours_are_told_apart():
    lines = [Line(label=str(n), points=[(0, n), (1, n)], dots=False) for n in range(COLOURS + 1)]
    drawn = chart("Loss", "lower is better", lines)
    assert len({(colour, broken) for _, colour, broken in drawn.labels}) == COLOURS + 1
    assert f"var(--series-{COLOURS})" in drawn.svg
    assert "stroke-dasharray" in drawn.svg
    assert not re.search(r"#[0-9a-f]{6}\b", drawn.svg), "every colour is the page's own"
    assert chart("Loss", "", [Line(label="a", points=[(0, math.nan)], dots=False)]) is None


def test_figures_in_words():
    assert [as_size(n) for n in (None, 0, 999, 1500, 10**6, 2.5e9, 3e15)] == [
        "\N{EN DASH}",
        "0 B",
        "999 B",
        "1.5 kB",
        "1.0 MB",
        "2.5 GB",
        "3000.0 TB",
    ]
    assert [as_number(n) for n in (None, math.inf, 3, 12345, 12345.6, 2.88759, 906.0)] == [
        "\N{EN DASH}",
        "\N{EN DASH}",
        "3",
        "12,345",
        "12,346",
        "2.888",
        "906.0",
    ]
    assert [as_duration(n) for n in (None, 4.25, 48, 185, 7800)] == [
        "\N{EN DASH}",
        "4.2 s",
        "48 s",
        "3 min 5 s",
        "2 h 10 min",
    ]
    assert [as_value(v) for v in (True, [], ["a", 1], 294912, 1e-3, None)] == [
        "yes",
        "\N{EN DASH}",
        "a, 1",
        "294,912",
        "0.001",
        "\N{EN DASH}",
    ]
