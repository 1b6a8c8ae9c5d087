"""The code blocks of docs/semantics.md, for the tests that run them."""

import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parent.parent / "docs" / "semantics.md"
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


class Block(NamedTuple):
    section: str  # the heading above it
    language: str
    code: str


def blocks() -> list[Block]:
    text = PAGE.read_text(encoding="utf-8")
    headings = [(match.start(), match.group(1).strip()) for match in re.finditer(r"^#+ (.*)$", re.sub(FENCE, _blank, text), re.MULTILINE)]

    def section(position: int) -> str:
        return [title for start, title in headings if start < position][-1]

    return [Block(section(match.start()), *match.groups()) for match in FENCE.finditer(text)]


def _blank(match: re.Match) -> str:
    """As long as the block, without its text: what looks like a heading in code is none."""
    return re.sub(r"[^\n]", " ", match.group(0))


def preamble() -> str:
    """The lines that every block starts with: the page's first block."""
    return blocks()[0].code
