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

from llama_fast.reports import units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

OURS = "llama-fast"
LIMIT = "limit"

_WIDTH = 8.6  # inches, as wide as a page's text: a wider picture is shrunk there, and its letters with it
_FLOOR = 8  # times smaller than the largest: nothing can be told apart down there

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
        names: what stands at x = 0, 1, 2, ...; then x runs down the page and y across it, so that long names lie flat.
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

    @property
    def values(self) -> list[float]:
        """All y."""
        return [y for series in self.series for _, y in series.points]

    @property
    def is_log(self) -> bool:
        """Whether y is logarithmic: it was asked for, or some would lie on the floor of a linear axis."""
        return self.log_y or 0 < _FLOOR * min(self.values) < max(self.values)


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
    alike = len({panel.names for panel in picture.panels}) == 1  # side by side: one column of names does for all
    columns = min(len(picture.panels), 2 if picture.panels[0].names else 3) if alike else 1
    rows = [picture.panels[i : i + columns] for i in range(0, len(picture.panels), columns)]
    heights = [max(_height(panel) for panel in row) for row in rows]
    legend_columns = max(1, int(12 * _WIDTH / (max(map(len, names)) + 8)))  # of about 12 characters an inch
    legend_rows = math.ceil(len(names) / legend_columns)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what a user has set
        matplotlib.rcParams.update(_RC)
        figure = Figure(figsize=(_WIDTH, sum(heights) + 0.5 + 0.18 * legend_rows), layout="constrained")
        FigureCanvasSVG(figure)
        figure.suptitle(picture.title, fontsize=11)
        grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
        for panel, (number, axes) in itertools.zip_longest(picture.panels, enumerate(grid.flat)):
            if panel is None:
                axes.remove()
                continue
            _draw_panel(axes, panel, names)
            if panel.names and number % columns:
                axes.tick_params(labelleft=False)
        handles = {
            label: handle
            for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }  # fmt: skip
        figure.legend(
            [handles[name] for name in names],
            names,
            loc="outside lower center",
            ncols=min(len(names), legend_columns),
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


def _height(panel: Panel) -> float:
    return 0.75 + 0.27 * len(panel.names) if panel.names else 3.0


def _draw_panel(axes: "Axes", panel: Panel, names: Sequence[str]) -> None:
    for series in panel.series:
        if series.name == LIMIT:
            _plot(axes, panel, series, color="#666666", linestyle="--", linewidth=1.2)
            continue
        color, marker = _style(series.name, names)
        # ours are large and below: whoever is as fast is seen on them
        size = 8 if series.name == OURS else 6.5 if series.name.startswith(OURS) else 5
        look = dict(color=color, marker=marker, markersize=size, linewidth=2.5 if series.name == OURS else 1.0)
        _plot(axes, panel, series, linestyle="-" if series.line else "", zorder=3 - size / 10, **look)
    axes.set_title(panel.title)
    x_axis, y_axis = (axes.yaxis, axes.xaxis) if panel.names else (axes.xaxis, axes.yaxis)
    x_axis.set_label_text(panel.x_label)
    y_axis.set_label_text(panel.y_label + ", logarithmic" * panel.is_log)
    if panel.names:
        axes.set_yticks(range(len(panel.names)), panel.names, fontsize=8)
        axes.set_ylim(len(panel.names) - 0.5, -0.5)
    if panel.log_x:
        _log_scale(axes.set_xscale, axes.xaxis, [x for series in panel.series for x, _ in series.points])
    if panel.ticks:
        axes.set_xticks(panel.ticks, [units.tokens(tick) for tick in panel.ticks])
    if panel.is_log:
        _log_scale(axes.set_xscale if panel.names else axes.set_yscale, y_axis, panel.values)
    elif panel.names:
        axes.set_xlim(left=0)
    else:
        axes.set_ylim(bottom=0)


def _log_scale(set_scale: Callable[[str], None], axis: "Axis", values: Sequence[float]) -> None:
    """With plain numbers instead of powers, as many as there is room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    set_scale("log")
    decades = math.log10(max(values) / min(values))
    steps = (1,) if decades > 3 else (1, 2, 5) if decades > 1 else (1, 1.5, 2, 3, 5, 7)
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
        along, across = zip(*points, strict=True)
        axes.plot(*((across, along) if panel.names else (along, across)), label=label, **look)
        label = None


def _style(name: str, names: Sequence[str]) -> tuple[str, str]:
    ours = [OURS, *(each for each in names if each.startswith(OURS) and each != OURS)]
    if name in ours:
        return _OURS_STYLES[ours.index(name) % len(_OURS_STYLES)]
    others = [each for each in names if each not in (*ours, *_PEERS, LIMIT)]
    round_, at = divmod([*_PEERS, *others].index(name), len(_STYLES))
    return _STYLES[at][0], _STYLES[(at + 3 * round_) % len(_STYLES)][1]  # a colour that comes again has another marker
