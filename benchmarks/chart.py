"""The table as a chart, if matplotlib is installed."""

from pathlib import Path

from benchmarks.results import Results, number

COLOURS = {"plain": "#bbbbbb", "stock": "#e0a458", "relay": "#33658a", "base": "#86bbd8"}


def draw(results: Results, path: Path) -> str:
    """Write one small bar chart per figure; return the path, or the reason for no chart."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no chart: matplotlib is missing (pip install '.[bench]')"
    keys = list(results.figures)
    columns = 4
    rows = max(1, -(-len(keys) // columns))
    picture = Figure(figsize=(4 * columns, 1.6 * rows), layout="constrained")
    FigureCanvasAgg(picture)
    for index, key in enumerate(keys):
        figure = results.figures[key]
        axes = picture.add_subplot(rows, columns, index + 1)
        sides = list(results.values[key])
        values = [results.value(key, side) or 0.0 for side in sides]
        bars = axes.barh(sides, values, color=[COLOURS.get(side, "#999999") for side in sides])
        axes.bar_label(bars, [number(value) for value in values], fontsize=7, padding=2)
        axes.set_title(f"{figure.title.strip()}, {figure.unit}", fontsize=8, loc="left")
        axes.tick_params(labelsize=7)
        axes.margins(x=0.2)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, dpi=100)
    return f"chart: {path}"
