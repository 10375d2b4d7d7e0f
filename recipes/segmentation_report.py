"""report.html: how well volumes were segmented, by class and by case, with the worst ones shown."""

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from recipes.workdir import write as write_file

FILE = "report.html"
_WORST = 6  # Cases whose overlays are shown.
_STYLE = """
:root { color-scheme: light dark; --line: #8885; --head: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead, tr.mean { background: var(--head); }
p.note { opacity: .75; max-width: 50rem; }
figure { margin: 1rem 0; } figcaption { margin-bottom: .3rem; }
img { max-width: 100%; background: #fff; }
"""
_NOTE = """Dice is 1 where a class is neither there nor predicted. HD95 is the 95th percentile of
the distances between the borders, in millimetres where the files give a spacing, and in voxels; it
is averaged over the cases that have the class and a prediction of it ("measured", of those that
have either). The reference columns are as results on Synapse are reported: HD95 in voxels, both
scores 0 where nothing is predicted, Dice 1 and HD95 0 where something is that is not there."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A volume and how well it was segmented.

    Attributes:
      name: its own.
      scores: of `recipes.scores.score`.
      overlay: a PNG, or None.
    """

    name: str
    scores: Mapping[str, np.ndarray]
    overlay: Path | None = None


def write(folder: Path, *, title: str, classes: Sequence[str], cases: Sequence[Case],
          images: Mapping[str, Path]) -> Path:
    """Writes the page, which needs no other file.

    Args:
      folder: where it goes.
      title: what was measured.
      classes: names by label, background first.
      cases: at least one; their scores are float64 [classes - 1].
      images: PNGs to show, by caption.

    Returns:
      The page's path.
    """
    ranked = sorted(cases, key=lambda case: float(case.scores["dice"].mean()))
    shown = [case for case in ranked if case.overlay is not None][:_WORST]
    parts = [
        f"<h1>{html.escape(title)}</h1>", "<h2>Classes</h2>", _classes_table(classes[1:], cases),
        f'<p class="note">{_NOTE}</p>',
        *(_figure(caption, path) for caption, path in images.items()),
        "<h2>Cases, the worst first</h2>", _cases_table(classes[1:], ranked)]
    if shown:
        parts += ["<h2>The worst ones</h2>", *(
            _figure(f"{case.name}, mean Dice {_number(case.scores['dice'].mean(), 3)}",
                    case.overlay) for case in shown)]
    path = folder / FILE
    write_file(path, (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts) + "\n</body></html>\n").encode())
    return path


def _classes_table(names: Sequence[str], cases: Sequence[Case]) -> str:
    scores = {name: np.stack([case.scores[name] for case in cases])
              for name in ("dice", "hd95", "hd95_voxels", "reference_dice", "reference_hd95")}
    measured = np.isfinite(scores["hd95"])
    there = ~np.isnan(scores["hd95"])

    def row(name, index, of=slice(None)):
        distances = [scores[key][of, index][measured[of, index]] for key in ("hd95", "hd95_voxels")]
        return [name, _number(scores["dice"][of, index].mean(), 4),
                *(_number(found.mean() if found.size else np.nan, 2) for found in distances),
                f"{measured[of, index].sum()} of {there[of, index].sum()}",
                _number(scores["reference_dice"][of, index].mean(), 4),
                _number(scores["reference_hd95"][of, index].mean(), 2)]

    return _table(["class", "Dice", "HD95", "in voxels", "measured", "reference Dice",
                   "reference HD95"],
                  [row(name, i) for i, name in enumerate(names)],
                  row("all", slice(None)))


def _cases_table(names: Sequence[str], cases: Sequence[Case]) -> str:
    def row(case):
        found = case.scores["hd95"][np.isfinite(case.scores["hd95"])]
        dice = case.scores["dice"]
        return [case.name, _number(dice.mean(), 4),
                _number(found.mean() if found.size else np.nan, 2),
                *(_number(x, 3) for x in dice)]

    return _table(["case", "mean Dice", "mean HD95", *(f"Dice, {name}" for name in names)],
                  [row(case) for case in cases])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], last: Sequence[str] = ()) -> str:
    def line(cells, tag="td"):
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

    body = [f"<tr>{line(row)}</tr>" for row in rows]
    if last:
        body.append(f'<tr class="mean">{line(last)}</tr>')
    return (f'<div class="wide"><table><thead><tr>{line(head, "th")}</tr></thead><tbody>\n'
            + "\n".join(body) + "\n</tbody></table></div>")


def _figure(caption: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return (f'<figure><figcaption>{text}</figcaption>'
            f'<img alt="{text}" src="data:image/png;base64,{data}"></figure>')


def _number(x: float, digits: int) -> str:
    return "–" if np.isnan(x) else f"{x:.{digits}f}"
