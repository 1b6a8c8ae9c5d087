"""What the trainers' examples share: the command line, and the report that sets a run with our critic beside one with the trainer's own."""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

OUT = Path(__file__).parents[1] / "out"
FIRST_STEPS = 5


@dataclass
class Run:
    """One training run. `curve`: what is learnt, a number per step; the seconds of each step, and of them those of the critic's side."""

    curve: Sequence[float]
    seconds_per_step: Sequence[float]
    critic_seconds_per_step: Sequence[float] | None = None


def arguments(description: str, *, steps: int, quick_steps: int, plot: str) -> argparse.Namespace:
    """--steps, --seed, --quick, --plot. `plot`: the file's name in examples/out/. --quick: a sample that is no more than seen to run."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--steps", type=int, help=f"training steps of each run (default {steps}; with --quick {quick_steps})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small and short")
    parser.add_argument("--plot", type=Path, default=OUT / plot)
    parsed = parser.parse_args()
    if parsed.steps is None:
        parsed.steps = quick_steps if parsed.quick else steps
    return parsed


def gap(ours: Run, theirs: Run) -> float:
    """The largest difference of the two curves at any step."""
    if len(ours.curve) != len(theirs.curve):
        raise ValueError(f"curves of {len(ours.curve)} and {len(theirs.curve)} steps")
    return max(abs(a - b) for a, b in zip(ours.curve, theirs.curve))


def compare(title: str, ours: Run, theirs: Run, *, trainer: str, quantity: str, path: Path | None = None) -> float:
    """Prints medians of the times and the last values of the curves, draws both into `path`, and returns the curves' gap.

    `trainer`: whose critic "theirs" is, as the table and the legend name it; `quantity`: what the curves show. Default path: examples/out/,
    named after the title.
    """
    names = (trainer, "fused_critic")
    table = Table("median over the steps", *names, "ratio", title=title)
    rows = [("step", theirs.seconds_per_step, ours.seconds_per_step)]
    if ours.critic_seconds_per_step and theirs.critic_seconds_per_step:
        rows.append(("critic's side of it", theirs.critic_seconds_per_step, ours.critic_seconds_per_step))
    medians = [(label, statistics.median(a), statistics.median(b)) for label, a, b in rows]
    for label, a, b in medians:
        table.add_row(label, _time(a), _time(b), f"{a / b:.2f}x")
    table.add_section()
    table.add_row(f"{quantity}, first step", f"{theirs.curve[0]:.4g}", f"{ours.curve[0]:.4g}", "")
    table.add_row(f"{quantity}, last step", f"{theirs.curve[-1]:.4g}", f"{ours.curve[-1]:.4g}", "")
    difference = gap(ours, theirs)
    table.add_row("largest gap of the curves", "", f"{difference:.3g}", "")

    path = path or OUT / (re.sub(r"\W+", "_", title.lower()).strip("_") + ".png")
    _plot(path, title, dict(zip(names, (theirs, ours))), medians, quantity)
    console = Console(width=max(100, Console().width))
    console.print(table)
    console.print(f"plot: {path}", soft_wrap=True, highlight=False)
    return difference


def same_returns(ours: Run, theirs: Run, our_losses: Sequence[float], their_losses: Sequence[float]) -> bool:
    """Prints for how many steps the curves, which are of returns, are equal, and how far apart the critic's losses of those steps are. True
    if the first FIRST_STEPS steps are among them.

    Advantages that differ in a last bit need many updates until an action is another one; from then on the two runs are two samples of one
    training, as two seeds are.
    """
    steps = len(ours.curve)
    same = next((i for i, (a, b) in enumerate(zip(ours.curve, theirs.curve)) if a != b), steps)
    losses = [abs(a - b) for a, b in zip(our_losses, their_losses)]
    print(f"the returns are the same for the first {same} of {steps} steps")
    print(f"largest gap of the critic's losses in those: {max(losses[:same], default=0):.3g}")
    if same < min(FIRST_STEPS, steps):
        print("NOT THE SAME")
        return False
    return True


def _unit(seconds: float) -> tuple[float, str]:
    return (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")


def _time(seconds: float) -> str:
    scale, unit = _unit(seconds)
    return f"{seconds * scale:.3g} {unit}"


def _plot(path: Path, title: str, runs: dict[str, Run], medians: list[tuple[str, float, float]], quantity: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Theirs wide and pale below, ours narrow and dark above: two equal curves stay two visible curves.
    styles = [{"color": "tab:orange", "linewidth": 5, "alpha": 0.5}, {"color": "tab:blue", "linewidth": 1.4}]
    size, widths = (6.5 + 2.7 * len(medians), 4), [6] + [2.5] * len(medians)
    figure, axes = plt.subplots(1, 1 + len(medians), figsize=size, layout="constrained", width_ratios=widths)
    figure.suptitle(title)
    for (name, run), style in zip(runs.items(), styles):
        axes[0].plot(run.curve, label=name, **style)
    axes[0].set(xlabel="step", ylabel=quantity)
    axes[0].legend(frameon=False)
    for panel, (label, *pair) in zip(axes[1:], medians):
        scale, unit = _unit(max(pair))
        for i, (seconds, style) in enumerate(zip(pair, styles)):
            panel.bar(i, seconds * scale, width=0.6, color=style["color"], alpha=style.get("alpha"))
            panel.text(i, seconds * scale, f"{seconds * scale:.3g}", ha="center", va="bottom")
        panel.set(title=label, ylabel=f"{unit}, median", ylim=(0, 1.15 * max(pair) * scale))
        panel.set_xticks([0, 1], [name.replace(" ", "\n") for name in runs])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
