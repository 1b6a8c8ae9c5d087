"""The docstrings' reStructuredText, which help() shows as it stands, as the Markdown that mkdocstrings expects (a griffe extension)."""

from __future__ import annotations

import re
import textwrap

import griffe

ROLE = re.compile(r":(\w+):`([^`]+)`")
MATH = re.compile(r"^( *)\.\. math::(.*)\n((?:(?:\1 +.*)?\n)*)", re.MULTILINE)
RULE = re.compile(r"^( *)(=+(?:  +=+)+)$", re.MULTILINE)


def markdown(text: str) -> str:
    return MATH.sub(math, ROLE.sub(role, tables(text)))


def role(match: re.Match) -> str:
    kind, content = match.groups()
    if kind == "math":
        return f"$`{words(content)}`$"
    return f"[`{content}`][fused_critic.{content}]" if kind in ("func", "class") else f"`{content}`"


def words(tex: str) -> str:
    """Names of several letters, upright: TeX would take them for products."""
    return re.sub(r"(?<![\\A-Za-z])[A-Za-z]{2,}", r"\\mathrm{\g<0>}", tex)


def math(match: re.Match) -> str:
    indentation, first, rest = match.groups()
    tex = words(f"{first.strip()}\n{textwrap.dedent(rest).strip()}".strip())
    if "&" in tex:
        tex = f"\\begin{{aligned}}\n{tex}\n\\end{{aligned}}"
    return textwrap.indent(f"```math\n{tex}\n```\n\n", indentation)


def tables(text: str) -> str:
    """Simple tables: three rules of ====, the head between the first two. A row with an empty cell goes on with the row above it."""
    lines, done = text.split("\n"), []
    while lines:
        line = lines.pop(0)
        rule = RULE.fullmatch(line)
        if not rule:
            done.append(line)
            continue
        spans = [match.span() for match in re.finditer("=+", line)]
        spans[-1] = (spans[-1][0], None)
        body = [lines.pop(0) for _ in range(1 + max(i for i, candidate in enumerate(lines) if candidate == line))]
        rows: list[list[str]] = []
        for row in body:
            if row == line:
                continue
            cells = [row[start:end].strip().replace("|", "\\|") for start, end in spans]
            if all(cells) or not rows:
                rows.append(cells)
            else:
                rows[-1] = [" ".join(filter(None, pair)) for pair in zip(rows[-1], cells)]
        rows.insert(1, ["---"] * len(spans))
        done += [f"{rule[1]}| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(done)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
