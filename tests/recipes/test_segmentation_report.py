"""The report page: its numbers, their order, and that it needs nothing else."""

import html.parser
import re

import numpy as np
import pytest

from recipes import segmentation_report
from recipes.overlays import draw
from recipes.scores import score
from recipes.segmentation_report import Case

CLASSES = ("background", "left <b>kidney</b>", "aorta")


class Page(html.parser.HTMLParser):
    """Rows of the tables, captions, and everything that a page could load."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.captions, self.sources, self.tags, self._inside = [], [], [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self._inside = tag
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside in ("td", "th"):
            self.rows[-1].append(data)
        elif self._inside == "figcaption":
            self.captions.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    truth = np.zeros((4, 12, 12), np.uint8)
    truth[1:3, 2:8, 2:8] = 1
    both = truth.copy()
    both[1:3, 9:11, 9:11] = 2
    moved = np.roll(truth, 1, axis=2)
    overlay = folder / "overlay.png"
    draw(overlay, np.zeros((12, 12)), {"truth": truth[1]}, CLASSES)
    cases = [Case("good & whole", score(truth, truth, 3, (3, 1, 1)), overlay),
             Case("moved", score(truth, moved, 3, (3, 2, 2))),
             Case("missed", score(both, np.zeros_like(truth), 3, (3, 1, 1)), overlay)]
    path = segmentation_report.write(folder, title="run <a>", classes=CLASSES, cases=cases,
                                     images={"curves": overlay})
    assert path == folder / "report.html" and not list(folder.glob("*.part"))
    return Page(path.read_text("utf-8")), path.read_text("utf-8")


def test_numbers(page):
    rows = page[0].rows
    dice = 2 * 2 * 6 * 5 / (2 * 2 * 6 * 6)
    # HD95 of the one case moved by a column is 2 mm, of the perfect one 0.
    assert rows[1] == [CLASSES[1], f"{(1 + dice + 0) / 3:.4f}", "1.00", "0.50", "2 of 3",
                       f"{(1 + dice + 0) / 3:.4f}", "0.33"]
    assert rows[2] == ["aorta", f"{2 / 3:.4f}", "–", "–", "0 of 1", "0.0000", "0.00"]
    assert rows[3][0] == "all" and rows[3][1] == f"{(3 + dice) / 6:.4f}"
    assert rows[3][4] == "2 of 4"


def test_the_worst_case_is_first(page):
    rows = page[0].rows[5:]
    assert [row[0] for row in rows] == ["missed", "moved", "good & whole"]
    assert rows[0][1:] == ["0.0000", "–", "0.000", "0.000"]
    assert page[0].captions == ["curves", "missed, mean Dice 0.000",
                                "good & whole, mean Dice 1.000"]


def test_it_stands_alone(page):
    found, text = page
    assert len(found.sources) == 3
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in found.sources)
    assert not found.tags & {"script", "link", "iframe", "b", "a"}
    assert "<h1>run &lt;a&gt;</h1>" in text and not re.search(r"https?:|url\(|@import", text)
