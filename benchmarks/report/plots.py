"""Pictures for the performance page: what is in one, as data, and how matplotlib draws it as SVG.

The same data give the same bytes with one release of matplotlib, and other bytes with another. So a picture carries a digest of all
that it shows, and whoever asks whether a picture is up to date compares that.
"""

import hashlib
import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_fast.profiler import units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

OURS = "llama-fast"
LIMIT = "limit"

# Okabe and Ito's colours and some darker ones, which people with any colour vision can tell apart; each with a marker of its own
_OURS_STYLES = (("#D55E00", "o"), ("#E69F00", "X"), ("#A65628", "*"))
_PEERS = ("PyTorch", "torch.compile", "Liger", "torch.compile max-autotune", "transformers")
"""Who looks the same in every picture: the first of _STYLES are theirs."""
_STYLES = (
    ("#000000", "s"), ("#0072B2", "^"), ("#009E73", "D"), ("#CC79A7", "v"), ("#56B4E9", "P"), ("#7F7F7F", "<"),
    ("#5E3C99", ">"), ("#01665E", "h"), ("#B2182B", "p"), ("#4D9221", "d"), ("#2166AC", "H"),
)  # fmt: skip
_RC: Any = {
    "svg.hashsalt": "llama-fast", "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#DDDDDD",
    "axes.axisbelow": True, "legend.frameon": False, "figure.facecolor": "white", "axes.facecolor": "white",
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """Points of one implementation, of one op, or of a limit; joined if `line`."""

    name: str
    points: tuple[tuple[float, float], ...]
    line: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        names: what stands at x = 0, 1, 2, ...
        breaks: the x before which lines break, because a size of another kind follows.
        ticks: where x has labels, in tokens.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    names: tuple[str, ...] = ()
    breaks: tuple[int, ...] = ()
    ticks: tuple[int, ...] = ()
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Picture:
    """A file: its name without folder, what it shows in words, and its panels from left to right."""

    file: str
    title: str
    panels: tuple[Panel, ...]

    @property
    def digest(self) -> str:
        """Of all that it shows."""
        rounded = json.loads(json.dumps(asdict(self)), parse_float=lambda digits: f"{float(digits):.6g}")
        return hashlib.sha256(json.dumps(rounded).encode()).hexdigest()[:16]


def shows(svg: str, picture: Picture) -> bool:
    """Whether an SVG file's text is of this picture."""
    return f"data {picture.digest}" in svg


def is_ours(svg: str) -> bool:
    """Whether an SVG file's text is of a picture that `draw` has written."""
    return "<dc:title>llama-fast</dc:title>" in svg and "<dc:description>data " in svg


def draw(picture: Picture, path: Path) -> None:
    """Writes a picture as SVG, on white, with text as text.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError('the report draws with matplotlib: pip install "llama-fast[bench]"') from None
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(series.name for panel in picture.panels for series in panel.series))
    longest = max((len(name) for panel in picture.panels for name in panel.names), default=0)
    widths = [max(4.6, 0.8 + 0.04 * longest + 0.34 * len(panel.names)) for panel in picture.panels]
    width = max(7.0, sum(widths))
    columns = max(1, int(12 * width / (max(map(len, names)) + 8)))  # of about 12 characters an inch
    height = 3.7 + 0.04 * longest + 0.18 * math.ceil(len(names) / columns)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what a user has set
        matplotlib.rcParams.update(_RC)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.suptitle(picture.title, fontsize=11)
        grid = figure.subplots(1, len(picture.panels), squeeze=False, width_ratios=widths)
        for axes, panel in zip(grid[0], picture.panels, strict=True):
            _draw_panel(axes, panel, names)
        handles = {
            label: handle
            for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }  # fmt: skip
        figure.legend(
            [handles[name] for name in names],
            names,
            loc="outside lower center",
            ncols=min(len(names), columns),
            fontsize=8,
        )
        # no date, no version: the same data, the same file
        svg = io.StringIO()
        figure.savefig(
            svg, format="svg",
            metadata={"Date": None, "Creator": "llama-fast", "Title": picture.title, "Description": f"data {picture.digest}"},
        )  # fmt: skip
    # where a reader does not have the font: Verdana is as wide, and a browser's own choice would have serifs
    path.write_text(svg.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif"), encoding="utf-8")


def _draw_panel(axes: "Axes", panel: Panel, names: Sequence[str]) -> None:
    for series in panel.series:
        if series.name == LIMIT:
            _plot(axes, panel, series, color="#666666", linestyle="--", linewidth=1.2)
            continue
        color, marker = _style(series.name, names)
        ours = series.name == OURS
        look = dict(color=color, marker=marker, markersize=6 if ours else 5, linewidth=2.0 if ours else 1.0)
        _plot(axes, panel, series, linestyle="-" if series.line else "", zorder=3 if ours else 2, **look)
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.names:
        axes.set_xticks(
            range(len(panel.names)), panel.names, rotation=40, ha="right", rotation_mode="anchor", fontsize=7.5
        )
        axes.set_xlim(-0.5, len(panel.names) - 0.5)
    if panel.log_x:
        _log_scale(axes.set_xscale, axes.xaxis, steps=(1,))
    if panel.ticks:
        axes.set_xticks(panel.ticks, [units.tokens(tick) for tick in panel.ticks])
    if panel.log_y:
        _log_scale(axes.set_yscale, axes.yaxis, steps=(1, 2, 5))
    else:
        axes.set_ylim(bottom=0)


def _log_scale(set_scale: Callable[[str], None], axis: "Axis", *, steps: tuple[int, ...]) -> None:
    """With plain numbers instead of powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def _plot(axes: "Axes", panel: Panel, series: Series, **look: Any) -> None:
    """A line, broken where the sizes change their kind; a limit of one size alone is a short bar."""
    label: str | None = series.name
    edges = [-0.5, *(at - 0.5 for at in panel.breaks), float("inf")]
    for low, high in itertools.pairwise(edges):
        points = [point for point in series.points if not panel.names or low < point[0] < high]
        if not points:
            continue
        if len(points) == 1 and series.name == LIMIT:
            points = [(points[0][0] - 0.3, points[0][1]), (points[0][0] + 0.3, points[0][1])]
        axes.plot([x for x, _ in points], [y for _, y in points], label=label, **look)
        label = None


def _style(name: str, names: Sequence[str]) -> tuple[str, str]:
    ours = [OURS, *(each for each in names if each.startswith(OURS) and each != OURS)]
    if name in ours:
        return _OURS_STYLES[ours.index(name) % len(_OURS_STYLES)]
    others = [each for each in names if each not in (*ours, *_PEERS, LIMIT)]
    round_, at = divmod([*_PEERS, *others].index(name), len(_STYLES))
    return _STYLES[at][0], _STYLES[(at + 3 * round_) % len(_STYLES)][1]  # a colour that comes again has another marker
