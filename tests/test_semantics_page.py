"""docs/semantics.md: every example prints what the page says, and every option is explained on it."""

import contextlib
import inspect
import io
import re

import fused_critic
import pytest
import semantics_page
import torch

DECIMALS = 4
NUMBER = re.compile(r"-?\d+\.\d*(?:e[+-]?\d+)?")
FUNCTIONS = ["value_loss", "ClippedValueLoss", "gae", "reverse_scan", "vtrace", "masked_whiten"]


def examples():
    """(code, output) of each python block that prints; its output is the text block that follows it."""
    blocks = semantics_page.blocks()
    return [
        (block.code, follower)
        for block, follower in zip(blocks, blocks[1:] + [None])
        if block.language == "python" and "print(" in block.code
    ]


def normalised(printed: str) -> list[str]:
    """The lines, with every number rounded and neither the device nor torch's padding for signs."""

    def rounded(match):
        return f"{round(float(match.group()), DECIMALS) + 0.0:.{DECIMALS}f}"  # + 0.0: never -0.0000

    lines = re.sub(r",\s+device='cuda:\d+'", "", NUMBER.sub(rounded, printed)).strip().splitlines()
    return [re.sub(r"\s+", " ", line).replace("[ ", "[").strip() for line in lines]


def test_every_example_has_its_output():
    assert examples()
    for code, follower in examples():
        assert follower is not None and follower.language == "text", code


@pytest.mark.parametrize("number", range(len(examples())))
def test_examples_print_what_the_page_says(device, number):
    code, follower = examples()[number]
    printed = io.StringIO()
    with torch.device(device), contextlib.redirect_stdout(printed):
        exec(semantics_page.preamble() + code, {})
    assert normalised(printed.getvalue()) == normalised(follower.code)


def test_every_option_is_on_the_page():
    text = semantics_page.PAGE.read_text(encoding="utf-8")
    for name in FUNCTIONS:
        for option in inspect.signature(getattr(fused_critic, name)).parameters.values():
            named = option.kind != option.VAR_KEYWORD  # a module that hands all of its options on
            assert not named or re.search(rf"\b{option.name}\b", text), f"{name}: {option.name} is not on the page"


def test_links_within_the_page():
    """A link to a heading that is not there would lead nowhere. GitHub's anchors: lower case, no punctuation, hyphens for blanks."""
    text = semantics_page.PAGE.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", semantics_page.FENCE.sub("", text), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]*)\)", text))
    assert links and links <= anchors, links - anchors
