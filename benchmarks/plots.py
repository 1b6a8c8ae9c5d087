"""Plots of every series of cases over sizes: time, and the share of a copy's bandwidth."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # to files, with or without a display
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

from .contenders import CONTENDERS, COPY, OURS
from .harness import Result

FIGURE_SIZE = (12, 5.5)  # inches
DPI = 120
OURS_COLOUR, COPY_COLOUR = "black", "0.55"
MARKERS = "osD^vP*X<>hp"
COLOURS = (
    "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan",
    "navy", "gold", "darkgreen", "magenta",
)  # fmt: skip
CACHES = ("warm", "cold")


def _styles() -> dict[str, dict]:
    """One colour and marker per contender, the same in every plot."""
    others = list(dict.fromkeys(who.name for who in CONTENDERS if who.name != OURS))
    styles = {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linewidth": 1.4} for i, name in enumerate(others)
    }
    styles[OURS] = {"color": OURS_COLOUR, "marker": "o", "linewidth": 2.6, "zorder": 3}
    styles[COPY] = {"color": COPY_COLOUR, "marker": ".", "linestyle": "--", "linewidth": 1.8}
    return styles


def write(folder: Path, results: list[Result], device: str) -> list[Path]:
    written = []
    series: dict[str, list[Result]] = {}
    for result in results:
        if result.series and result.rows:
            series.setdefault(result.series, []).append(result)
    for title, members in series.items():
        members = sorted(members, key=lambda result: result.tokens)
        threads = max(row.threads for result in members for row in result.rows)
        where = f"{title}, float32\n{device}, {threads} thread{'s' * (threads > 1)}"
        if any(row.busy for result in members for row in result.rows):
            where += "; the machine was busy, which lengthens medians"
        stem = re.sub(r"\W+", "-", title.lower())
        for kind, draw in (("time", _draw_time), ("bandwidth", _draw_share)):
            written.append(folder / f"{stem}-{kind}.png")
            _plot(written[-1], where, members, threads, draw)
    return written


def _plot(path: Path, title: str, members: list[Result], threads: int, draw) -> None:
    styles = _styles()
    figure, panels = plt.subplots(1, len(CACHES), figsize=FIGURE_SIZE, sharey=True, layout="constrained")
    figure.suptitle(title, fontsize=11)
    legend = {}
    for axes, cache in zip(panels, CACHES):
        axes.set_xscale("log")
        axes.set_yscale("log")
        draw(axes, members, threads, cache, styles)
        ticks = [result.tokens for result in members]
        axes.set_xticks(ticks, [_tokens(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("tokens")
        axes.set_title(f"{cache} cache", fontsize=10)
        axes.grid(which="major", alpha=0.3)
        for line in axes.get_lines():
            legend.setdefault(line.get_label(), line)
    panels[1].tick_params(labelleft=True)
    figure.legend(legend.values(), legend.keys(), loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _names(members: list[Result]) -> list[str]:
    """In the order of the largest times, as their lines lie in the plot of times."""
    slowest: dict[str, float] = {}
    for result in members:
        for row in result.rows:
            slowest[row.contender] = max(slowest.get(row.contender, 0.0), row.median / result.tokens)
    return sorted(slowest, key=slowest.get, reverse=True)


def _draw_time(axes, members, threads, cache, styles) -> None:
    for name in _names(members):
        rows = {result.tokens: row for result in members if (row := result.find(name, threads, cache))}
        medians, least = [row.median for row in rows.values()], [row.best for row in rows.values()]
        axes.plot(list(rows), medians, label=name, **styles[name])
        axes.vlines(list(rows), least, medians, color=styles[name]["color"], alpha=0.5)
    axes.set_ylabel("median time (vertical line: down to the best)")
    axes.yaxis.set_major_formatter(FuncFormatter(_seconds))


def _draw_share(axes, members, threads, cache, styles) -> None:
    for name in reversed(_names(members)):
        points = []
        for result in members:
            row, copy = result.find(name, threads, cache), result.find(COPY, threads, cache)
            if row and copy:
                points.append((result.tokens, copy.median / row.median))
        if points:
            axes.plot(*zip(*points), label=name, **styles[name])
    axes.set_ylabel("share of the bandwidth of a torch copy of the same bytes")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))


def _seconds(seconds: float, _=None) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale * (1 - 1e-9):
            return f"{seconds / scale:g} {unit}"
    return f"{seconds * 1e9:g} ns"


def _tokens(tokens: float) -> str:
    for suffix, scale in (("M", 2**20), ("k", 2**10)):
        if tokens >= scale:
            return f"{tokens / scale:g}{suffix}"
    return f"{tokens:g}"
