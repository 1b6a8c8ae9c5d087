"""Draws docs/images/*.svg: python docs/_site/diagrams.py. Needs nothing but Python; tests/test_docs.py holds the committed files to it.

The drawings have a ground of their own and follow the reader's preference for light or dark, on the site and on a git host alike.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "images"

STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #1f2933; }
  .small { font-size: 11.5px; } .muted { fill: #5f6c7b; } .bold { font-weight: 600; } .title { font-size: 14px; font-weight: 600; }
  .code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 11.5px; }
  .ground { fill: #ffffff; stroke: #d5dbe1; } .box { fill: #f2f5f7; stroke: #8c99a6; }
  .a { fill: #d7f0ea; stroke: #1b8a73; } .b { fill: #fdebd0; stroke: #b7791f; } .c { fill: #dfe9fb; stroke: #3b6fc4; }
  .masked { fill: #e3e7eb; stroke: #a3adb8; } .line { stroke: #44525f; fill: none; stroke-width: 1.4; } .head { fill: #44525f; }
  .carry { stroke: #1b8a73; fill: none; stroke-width: 1.6; } .carryhead { fill: #1b8a73; } .dashed { stroke-dasharray: 4 3; }
  .stop { stroke: #c0392b; stroke-width: 2.4; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6eaee; } .muted { fill: #9fabb7; } .ground { fill: #1f242c; stroke: #3b444f; } .box { fill: #2a313b; stroke: #76828f; }
    .a { fill: #174a40; stroke: #4cc2a6; } .b { fill: #543f17; stroke: #dba84b; } .c { fill: #22395f; stroke: #7ba4ea; }
    .masked { fill: #343c46; stroke: #66717d; } .line { stroke: #b3bdc7; } .head { fill: #b3bdc7; }
    .carry { stroke: #4cc2a6; } .carryhead { fill: #4cc2a6; } .stop { stroke: #ef7e70; }
  }
"""
ROUND = 'rx="5"'


class Drawing:
    def __init__(self, width: int, height: int, description: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
            f"<title>{escape(description)}</title>",
            f"<style>{STYLE}</style>",
            "<defs>",
            *(
                f'<marker id="{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
                f'<path class="{kind}" d="M0 0.6 L8 4 L0 7.4 z"/></marker>'
                for kind in ("head", "carryhead")
            ),
            "</defs>",
            f'<rect class="ground" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        ]

    def text(self, x: float, y: float, content: str, style: str = "", anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(content)}</text>')

    def box(self, x: float, y: float, width: float, height: float, style: str = "box") -> None:
        self.parts.append(f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" {ROUND}/>')

    def label(self, x: float, y: float, width: float, lines: list[tuple[str, str]], style: str = "box", height: float = 0) -> float:
        """A box with lines of (style, text) in its middle. Returns its lower edge."""
        height = height or 17 * len(lines) + 13
        self.box(x, y, width, height, style)
        first = y + height / 2 - 17 * (len(lines) - 1) / 2 + 4.5
        for i, (line_style, content) in enumerate(lines):
            self.text(x + width / 2, first + 17 * i, content, line_style, "middle")
        return y + height

    def path(self, d: str, style: str = "line", head: str = "head") -> None:
        self.parts.append(f'<path class="{style}" d="{d}"' + (f' marker-end="url(#{head})"' if head else "") + "/>")

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


# The reference vectors of docs/design.md.
GAMMA, LAM = 0.9, 0.8
MASK, VALUES, REWARDS = (1, 1, 0, 0, 1, 1, 0), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), (0, 0, 0, 0, 0, 1, 0)


def advantages(mode: str) -> list[float]:
    """What fused_critic.gae gives for the reference vectors."""
    result, a_next, v_next = [0.0] * len(MASK), 0.0, 0.0
    for t in reversed(range(len(MASK))):
        value, reward = VALUES[t], float(REWARDS[t])
        if not MASK[t] and mode == "skip":
            continue
        if not MASK[t] and mode == "reset":
            a_next = v_next = 0.0
            continue
        if not MASK[t] and mode == "zero":
            value = reward = 0.0
        a_next = reward + GAMMA * v_next - value + GAMMA * LAM * a_next
        v_next = value
        result[t] = a_next if MASK[t] or mode == "ignore" else 0.0
    return result


MODES = {
    "skip": "transparent: advantage and next value pass over masked positions unchanged",
    "zero": "they count with r = V = 0: every masked position costs a factor γλ",
    "reset": "they end the sequence: nothing passes a gap",
    "ignore": "the mask takes no part: what masked positions hold flows into the others",
}


def mask_modes() -> Drawing:
    drawing = Drawing(640, 545, "What moves from right to left through masked positions in the four mask modes of GAE")
    left, pitch, width, height = 110, 73, 61, 32

    def centre(t: int) -> float:
        return left + pitch * t + width / 2

    drawing.text(20, 28, "Four meanings of a mask", "title")
    for t in range(len(MASK)):
        drawing.text(centre(t), 54, f"V = {VALUES[t]:g}", "small muted", "middle")
    drawing.text(620, 28, "γ = 0.9, λ = 0.8; r = 0, but r₅ = 1", "small muted", "end")
    for row, (mode, meaning) in enumerate(MODES.items()):
        top = 118 + 112 * row
        drawing.text(20, top - 34, f'"{mode}"', "code bold")
        drawing.text(left, top - 34, meaning, "small muted")
        drawing.text(20, top + 21, "advantage", "small")
        for t, advantage in enumerate(advantages(mode)):
            x, used = left + pitch * t, MASK[t] or mode == "ignore"
            drawing.box(x, top, width, height, "a" if used else "masked")
            drawing.text(centre(t), top + 21, f"{advantage:.4f}" if used else "0", "code" if used else "code muted", "middle")
        for source, target, factor in hops(mode):
            x1, x2, y = centre(source) - 6, centre(target) + 6, top - 2
            lift = 13 if source - target == 1 else 22
            if factor is None:
                x = left + pitch * source - (pitch - width) / 2
                drawing.path(f"M{x:g} {top - 12:g} L{x:g} {top + height + 4:g}", "stop", head="")
                continue
            drawing.path(f"M{x1:g} {y:g} C{x1 - 6:g} {y - lift:g} {x2 + 6:g} {y - lift:g} {x2:g} {y:g}", "carry", head="carryhead")
            drawing.text((x1 + x2) / 2, top + height + 15, factor, "small muted", "middle")
    top = 545 - 22
    drawing.box(20, top - 11, 22, 14, "a")
    drawing.text(48, top + 1, "valid or used", "small")
    drawing.box(150, top - 11, 22, 14, "masked")
    drawing.text(178, top + 1, "masked", "small")
    drawing.path(f"M292 {top - 4} L258 {top - 4}", "carry", head="carryhead")
    drawing.text(300, top + 1, "advantage and value move on", "small")
    drawing.path(f"M494 {top - 11} L494 {top + 4}", "stop", head="")
    drawing.text(502, top + 1, "nothing passes", "small")
    return drawing


def hops(mode: str) -> list[tuple[int, int, str | None]]:
    """(from, to, what the advantage is multiplied by; None: the boundary before `from` is closed)."""
    positions = range(len(MASK))
    if mode in ("zero", "ignore"):
        return [(t + 1, t, "γλ") for t in positions[:-1]]
    valid = [t for t in positions if MASK[t]]
    if mode == "skip":
        return [(source, target, "γλ") for target, source in zip(valid, valid[1:])]
    steps: list[tuple[int, int, str | None]] = [(t + 1, t, "γλ" if MASK[t] and MASK[t + 1] else None) for t in positions[:-1]]
    return [step for step in steps if step[2] or MASK[step[1]] or MASK[step[0]]]


def call_flow() -> Drawing:
    drawing = Drawing(
        640, 652, "How a call passes from the public function through torch's dispatcher to a kernel, and how backward returns"
    )
    drawing.text(20, 28, "One call, from Python to a kernel and back", "title")
    x, width, middle = 150, 340, 320

    def arrow(y1: float, y2: float, at: float = middle) -> None:
        drawing.path(f"M{at:g} {y1:g} L{at:g} {y2 - 1:g}")

    y = drawing.label(
        x,
        46,
        width,
        [("code bold", "fused_critic.gae(...)"), ("small muted", "numbers to arguments; whiten, turns: composed of calls")],
        "c",
    )
    arrow(y, y + 22)
    y = drawing.label(
        x,
        y + 22,
        width,
        [("code bold", "torch.ops.fused_critic.gae"), ("small muted", "torch's dispatcher; .tensor: numbers as 0-d tensors")],
    )
    drawing.label(20, y + 34, 118, [("bold", "vmap"), ("code", "_vmap.py")])
    drawing.label(20, y + 100, 118, [("bold", "tracing"), ("small", "shapes alone"), ("code", "_fake.py")])
    drawing.path(f"M{x} {y - 10:g} L80 {y - 10:g} L80 {y + 33:g}", "line dashed")
    drawing.path(f"M{x} {y - 22:g} L8 {y - 22:g} L8 {y + 132:g} L19 {y + 132:g}", "line dashed")
    arrow(y, y + 34)
    y = drawing.label(
        x,
        y + 34,
        width,
        [
            ("bold", "Autograd key, C++"),
            ("small muted", "records a node if an input needs a gradient;"),
            ("small muted", "refuses forward mode"),
        ],
        "b",
    )
    node = y - 32
    arrow(y, y + 22)
    y = drawing.label(
        x,
        y + 22,
        width,
        [("bold", "jagged nested tensors?"), ("small muted", "a rule calls again with values() and offsets(): _jagged.py")],
    )
    arrow(y, y + 22)
    y = drawing.label(
        x,
        y + 22,
        width,
        [("bold", "host entry: csrc/gae.cpp"), ("small muted", "every check, once; outputs; a plain parameter block")],
        "a",
    )
    columns = [(20, "CPU", "csrc/cpu/gae.cpp", "division among threads", "AVX-512, AVX2, baseline"), (227, "CUDA", "csrc/cuda/gae.cu", "launch_gae", "one launch (or two)"),
               (434, "other devices", "_fallback.py", "torch operations,", "a warning once")]  # fmt: skip
    for left, *lines in columns:
        at = left + 93
        if left == 434:
            drawing.path(f"M490 {y - 70:g} L527 {y - 70:g} L527 {y + 35:g}", "line dashed")
        else:
            drawing.path(f"M{middle if left == 227 else 250} {y:g} L{middle if left == 227 else at} {y + 35:g}")
        styles = ("bold", "code", "small muted", "small muted")
        drawing.label(left, y + 36, 186, list(zip(styles, lines)), "a" if left != 434 else "box")
    bottom = y + 36 + 81
    drawing.label(
        20, bottom + 34, 600,
        [("bold", "backward"), ("code", "torch.ops.fused_critic.gae_backward"), ("small muted", "called by the node, on what it saved; takes the same way down")],
        "b",
    )  # fmt: skip
    drawing.path(f"M490 {node:g} L630 {node:g} L630 {bottom + 66:g} L621 {bottom + 66:g}", "line dashed")
    return drawing


def affine_scan() -> Drawing:
    drawing = Drawing(640, 478, "GAE as affine maps: composed within lanes, scanned across lanes, applied within lanes")
    drawing.text(20, 28, "A step is an affine map, and maps compose", "title")
    drawing.text(20, 52, "the state that moves left:  x = γλ·A(t+1) + γ·V(t+1),  then  A(t) = r(t) − V(t) + x", "small")
    drawing.text(20, 71, "a step:  f(x) = a·x + b,  a = γλ,  b = γλ·(r − V) + γ·V;  masked: the identity;  terminated: a = 0", "small")
    left, pitch, width, height, tokens = 168, 57, 49, 28, 8

    def token(t: float) -> float:
        return left + pitch * t

    def explain(y: float, title: str, *lines: str) -> None:
        drawing.text(20, y, title, "bold")
        for i, line in enumerate(lines):
            drawing.text(20, y + 17 * (i + 1), line, "small muted")

    lane_width = pitch + width
    explain(114, "1. Compose", "each lane the maps", "of its own tokens,", "all at once")
    for t in range(tokens):
        drawing.label(token(t), 100, width, [("code", f"f{t}")], "c", height=height)
        drawing.path(f"M{token(t) + width / 2:g} {100 + height} L{token(t // 2 * 2) + lane_width / 2 + (t % 2 * 2 - 1) * 8:g} 151")
    for i in range(tokens // 2):
        drawing.label(token(2 * i), 152, lane_width, [("code", f"F{i} = f{2 * i}∘f{2 * i + 1}")], "c", height=height)

    explain(236, "2. Scan", "the lanes' maps, in", "log₂(lanes) steps:", "the x that enters each")
    for i in range(tokens // 2):
        maps = "∘".join(f"F{j}" for j in range(i + 1, tokens // 2))
        drawing.label(token(2 * i), 230, lane_width, [("code", f"{maps} (x)" if maps else "x")], "b", height=height)
        if i:
            y, x = 205, token(2 * i) + lane_width / 2
            drawing.path(
                f"M{x:g} {152 + height} L{x:g} {y} L{token(2 * i - 2) + lane_width / 2:g} {y} L{token(2 * i - 2) + lane_width / 2:g} 229"
            )
    drawing.text(token(tokens) - pitch + width, 222, "x: bootstrap, or 0", "small muted", "end")

    explain(322, "3. Apply", "each lane its steps to", "the x that entered")
    for i in range(tokens // 2):
        drawing.path(f"M{token(2 * i + 1) + width / 2:g} {230 + height} L{token(2 * i + 1) + width / 2:g} 307")
    for t in range(tokens):
        drawing.label(token(t), 308, width, [("code", f"A{t}")], "a", height=height)
        if t % 2:
            drawing.path(f"M{token(t):g} {308 + height / 2} L{token(t - 1) + width + 1:g} {308 + height / 2}", "carry", head="carryhead")

    drawing.text(20, 386, "(a₂, b₂) ∘ (a₁, b₁) = (a₂·a₁, a₂·b₁ + b₂)", "code bold")
    lines = [
        "A lane: a vector’s on the CPU, a thread on CUDA. What leaves lane 0 enters the next tile as its x.",
        "Where an episode ends inside a tile, a map with a = 0 stops the state.",
        "The adjoint is the same kind of scan, from left to right.",
    ]
    for i, line in enumerate(lines):
        drawing.text(20, 412 + 20 * i, line, "small")
    return drawing


DRAWINGS: dict[str, Callable[[], Drawing]] = {"mask-modes.svg": mask_modes, "call-flow.svg": call_flow, "affine-scan.svg": affine_scan}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (IMAGES / name).write_text(draw().svg(), encoding="utf-8")
