"""The docstrings' reStructuredText, which help() shows as it stands, as the Markdown that mkdocstrings expects (a griffe extension)."""

from __future__ import annotations

import re
import textwrap

import griffe

ROLE = re.compile(r":(\w+):`([^`]+)`")
MATH = re.compile(r"^( *)\.\. math::(.*)\n((?:(?:\1 +.*)?\n)*)", re.MULTILINE)
RULE = re.compile(r"^( *)(=+(?:  +=+)+)$", re.MULTILINE)


def markdown(text: str, module: griffe.Module) -> str:
    def role(match: re.Match) -> str:
        kind, content = match.groups()
        if kind == "math":
            return f"$`{words(content)}`$"
        target = documented(content, module)
        return f"[`{content}`][{target}]" if target else f"`{content}`"

    return MATH.sub(math, ROLE.sub(role, tables(text)))


def documented(name: str, module: griffe.Module) -> str | None:
    """The path of what a role names: something of the same module, or of the package's public API."""
    name = name.removeprefix("fused_critic.")
    if name in module.members and not name.startswith("_") and module.members[name].has_docstring:
        return f"{module.path}.{name}"
    return f"fused_critic.{name}" if name in (module.package.exports or ()) else None


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
    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        self.visit(pkg)

    def visit(self, obj: griffe.Object) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value, obj if isinstance(obj, griffe.Module) else obj.module)
        for member in obj.members.values():
            if not member.is_alias:
                self.visit(member)
