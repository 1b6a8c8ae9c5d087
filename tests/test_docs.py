"""The pages: their links, anchors, images and lists, the site's navigation, and the drawings. `make docs` builds the site itself."""

import importlib.util
import re
from pathlib import Path

import fused_critic
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md", *DOCS.rglob("*.md")])
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """The page without its code blocks, which are blank lines here."""
    return FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Those of its headings, as git hosts and the site form them: letters, digits, hyphens and underscores of the text."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    return [target for target in LINK.findall(CODE.sub("", prose(page))) if not re.match(r"[a-z]+:", target)]


def drawings():
    specification = importlib.util.spec_from_file_location("diagrams", DOCS / "_site" / "diagrams.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page):
    for link in links(page):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.is_file(), f"{link}: no such file (a folder has no page: link its README.md)"
        assert file.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(file), f"{link}: no such heading"


def test_links_are_found():
    """Else the test above would say nothing."""
    assert "docs/kernels.md" in links(ROOT / "README.md")
    assert "images/mask-modes.svg" in links(DOCS / "semantics.md")
    assert "clip_range-and-clip_only" in anchors(DOCS / "semantics.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lists_are_lists_on_the_site_too(page):
    """A git host lets a list follow a paragraph without a blank line; the site makes it a part of the paragraph."""
    in_list, before = False, ""
    for line in prose(page).splitlines():
        item = re.match(r"\s*([-*+]|\d+\.) ", line) is not None
        assert not item or in_list or not before.strip() or before.startswith("#"), f"a blank line is missing before: {line}"
        in_list = item or (in_list and (not line.strip() or line.startswith(" ") or bool(before.strip())))
        before = line


def test_every_page_is_in_the_navigation_of_the_site():
    configuration = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    navigation = configuration[configuration.index("\nnav:") : configuration.index("\ntheme:")]
    entries = re.findall(r"^ +- (?:[^:\n]*: )?(\S+\.md)$", navigation, re.MULTILINE)
    listed = [page for entry in entries for page in (sorted(DOCS.glob(entry)) or [ROOT / entry])]
    assert all(page.is_file() for page in listed), "the navigation names a page that is not there"
    assert len(listed) == len(set(listed)), "a page is in the navigation twice"
    assert set(DOCS.rglob("*.md")) <= set(listed), "pages are missing in mkdocs.yml"


def test_the_drawings_are_those_that_are_drawn():
    for name, draw in drawings().DRAWINGS.items():
        assert (DOCS / "images" / name).read_text(encoding="utf-8") == draw().svg(), f"{name}: run docs/_site/diagrams.py"


def test_the_drawn_advantages_are_those_of_gae():
    drawn = drawings()
    rewards, values, mask = (torch.tensor(numbers) for numbers in (drawn.REWARDS, drawn.VALUES, drawn.MASK))
    for mode in drawn.MODES:
        advantages = fused_critic.gae(rewards.float(), values, mask, gamma=drawn.GAMMA, lam=drawn.LAM, mask_mode=mode).advantages
        torch.testing.assert_close(torch.tensor(drawn.advantages(mode)), advantages)
