"""The tables of the section "Scaling" of the page on torch.distributed follow from its assumptions; `python tests/test_scaling_page.py` prints them."""

import math
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
LATENCY, BANDWIDTH = 25e-6, 25e9  # of a step of a collective in seconds; per rank in bytes per second
ROWS, LENGTH = 512, 32768  # sequences of a call, and tokens of each over all ranks
RANKS = (2, 8, 64, 1024)
# float64 numbers that each rank gives to an all-reduce, and to an all-gather
COUNTS = {"value loss": 1, "global counts": 2}
CALLS = {
    "statistics": 14,
    "whitening": 3,
    "context-parallel GAE, contiguous": 2 * ROWS,
    "context-parallel GAE, head-tail": 4 * ROWS,
}
TOKENS = ROWS * LENGTH * (4 + 4 + 1)  # bytes of rewards and values in float32 and a bool mask, over all ranks


def size(received: float) -> str:
    for unit in ("B", "kB", "MB"):
        if received < 1000:
            return f"{received:.3g} {unit}"
        received /= 1000
    return f"{received:.3g} GB"


def cell(received: float, ranks: int, passes: int = 1) -> str:
    """Bytes that a rank receives from the others; milliseconds until it has them, by a tree and by a ring, gone through `passes` times."""
    tree, ring = (passes * steps * LATENCY + received / BANDWIDTH for steps in (math.ceil(math.log2(ranks)), ranks - 1))
    return f"{size(received)}, {1e3 * tree:.3g} / {1e3 * ring:.3g} ms"


def table() -> str:
    # An all-reduce: reduce, then gather.
    rows = {name: [cell(2 * 8 * numbers * (ranks - 1) / ranks, ranks, passes=2) for ranks in RANKS] for name, numbers in COUNTS.items()}
    rows |= {name: [cell(8 * numbers * (ranks - 1), ranks) for ranks in RANKS] for name, numbers in CALLS.items()}
    rows["*all tokens instead*"] = [cell(TOKENS * (ranks - 1) / ranks, ranks) for ranks in RANKS]
    lines = ["| call | " + " | ".join(f"{ranks} ranks" for ranks in RANKS) + " |", "|---" * (1 + len(RANKS)) + "|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()])


def test_the_page_has_what_the_formula_gives():
    assert any(table() in page.read_text() for page in DOCS.glob("distributed*.md")), table()


if __name__ == "__main__":
    print(table())
