"""Puts the results of a run into docs/performance.md: ``python -m benchmarks.publish`` after ``make bench``."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from .contenders import COPY, OURS
from .report import duration

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- begin: cpu -->\n", "<!-- end: cpu -->"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def times(results: list[dict], cache: str, threads: int) -> list[str]:
    """A row per case: ours, the copy, and everyone else from the fastest on, in multiples of ours."""
    lines = ["| case | fused_critic | copy of the same bytes | others, in multiples of ours |", "|---|---|---|---|"]
    for result in results:
        rows = [row for row in result["rows"] if (row["cache"], row["threads"]) == (cache, 1 if result["is_call"] else threads)]
        if not rows:
            continue
        ours, *others = rows
        copy = next((row["median"] for row in others if row["contender"] == COPY), None)
        others = sorted((row for row in others if row["contender"] != COPY), key=lambda row: row["median"])
        name = "" if ours["contender"] == OURS else f" ({ours['contender']})"
        copied = f"{duration(copy)} ({ours['median'] / copy:.2f}x)" if copy else ""
        told = ", ".join(f"{row['contender']} {_number(row['median'] / ours['median'])}" for row in others)
        lines.append(f"| {result['title']}{name} | {duration(ours['median'])} ± {ours['spread']:.0%} | {copied} | {told} |")
    return lines


def goals(verdicts: list[dict]) -> list[str]:
    lines = ["| goal | by medians | by best times | verdict |", "|---|---|---|---|"]
    for verdict in verdicts:
        numbers = [f"{_number(verdict[which])}" if verdict[which] is not None else "" for which in ("median", "best")]
        lines.append(f"| {verdict['goal']} | {numbers[0]} | {numbers[1]} | {verdict['verdict']} |")
    return lines


def accuracy(errors: list[dict]) -> list[str]:
    lines = ["| relative or largest error against float64 | fused_critic | verl, float32 |", "|---|---|---|"]
    return lines + [f"| {error['quantity']} | {error['ours']:.3g} | {error['verl']:.3g} |" for error in errors]


def section(run: dict, images: list[str]) -> str:
    about = run["environment"]
    threads = int(about["threads"].split(",")[0])
    parts = [
        f"{about['cpu']}, torch {about['torch']}, Python {about['python']}; {threads} threads (calls: one); medians ± interquartile range.",
        "Warm cache:",
        "\n".join(times(run["results"], "warm", threads)),
        f"Cold cache ({about['cold cache']}):",
        "\n".join(times(run["results"], "cold", threads)),
        "The project's goals. A verdict needs medians and best times to agree and most runs to have kept their cores:",
        "\n".join(goals(run["goals"])),
        "Accuracy on the same data:",
        "\n".join(accuracy(run["accuracy"])),
        "\n\n".join(f"![{name.removesuffix('.png').replace('-', ' ')}](images/{name})" for name in images),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__)
    parser.add_argument("--results", metavar="DIR", type=Path, default=Path(__file__).parent / "out", help="where the run put them")
    parser.add_argument("--document", metavar="FILE", type=Path, default=DOCUMENT, help="what to renew; images go beside it")
    options = parser.parse_args(arguments)
    images = sorted(path.name for path in options.results.glob("*.png"))
    target = options.document.parent / "images"
    target.mkdir(exist_ok=True)
    for name in images:
        shutil.copyfile(options.results / name, target / name)
    text = options.document.read_text()
    head, rest = text.split(BEGIN)
    run = json.loads((options.results / "results.json").read_text())
    options.document.write_text(head + BEGIN + "\n" + section(run, images) + "\n" + END + rest.split(END, 1)[1])


if __name__ == "__main__":
    main()
