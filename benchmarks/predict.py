"""Predicted times of the CUDA kernels, from counted costs: ``python -m benchmarks.predict`` renews the tables and the plot of docs/performance.md.

Two steps. Counting needs the CUDA build and the simulated GPU of tests/fakecuda, and is repeated when a kernel changes (``--count``; the
command is in docs/performance.md). Predicting is arithmetic on what was counted (docs/predicted/counts.json) and on what the compiler said
about registers (docs/kernels.md). Nothing here has been measured: the model and its assumptions are stated in docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
KERNELS = ROOT / "docs" / "kernels.md"
COUNTS = ROOT / "docs" / "predicted" / "counts.json"
MEASURED = ROOT / "docs" / "predicted" / "measured.json"  # absent until somebody measures
PLOT = ROOT / "docs" / "images" / "predicted.png"

WARP = 32
SECTOR = 32  # bytes
SCHEDULERS = 4  # per multiprocessor
MASKED = 0.3  # share of the tokens that the counted calls mask, at random: the dearest mask


# --- the cards -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """Vendor's figures of one card; where they come from is in docs/performance.md."""

    name: str
    architecture: int  # sm_
    multiprocessors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes per second of the memory
    l2_bytes: float
    issue: float  # warp instructions per cycle and scheduler, sustained


MB = 2**20
CARDS = (
    Card("A100 80 GB SXM", 80, 108, 1.41e9, 2.039e12, 40 * MB, 0.5),
    Card("H100 SXM", 90, 132, 1.98e9, 3.35e12, 50 * MB, 0.7),
    Card("H200 SXM", 90, 132, 1.98e9, 4.8e12, 50 * MB, 0.7),
    Card("B200", 100, 148, 1.98e9, 7.7e12, 126 * MB, 0.7),
)

# Assumptions, the same for all cards. What each means and what would falsify it: docs/performance.md.
LAUNCH = 2.5e-6  # seconds from a kernel's launch to its first instruction, and from its last to the end
NEXT_LAUNCH = 1.0e-6  # what one more launch or memset of the same call adds, queued behind
MEMORY_SHARE = 0.90  # of the memory's bandwidth that a kernel reaches which does nothing but copy
L2_BYTES_PER_CYCLE, L2_SHARE = 5120, 0.6
L2_RESIDENT_SHARE = 0.5  # of the L2: calls that touch no more find their operands there on the next call
PORT_BYTES_PER_CYCLE = 64  # between one multiprocessor and the L2
MEMORY_LATENCY, L2_LATENCY = 0.70e-6, 0.30e-6  # seconds, under load
FINISH_ROUND_TRIPS = 3  # of the loss' last block: fence and ticket, partials, result
CHAIN_CYCLES = {"gae": 4, "value_loss": 2, "value_loss_backward": 2}  # per instruction of a warp that waits for no other


# --- what was counted ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    kernel: str  # as in docs/kernels.md
    blocks: int
    threads: int
    warp_instructions: int
    bytes_read: int  # in sectors
    bytes_written: int

    @property
    def bytes_moved(self):
        return self.bytes_read + self.bytes_written

    @property
    def warps(self):
        return -(-self.threads // WARP) * self.blocks

    @property
    def tokens_in_flight(self):
        """Tokens per warp whose loads are issued before the first is used: tiles of the scans, passes of the loss (csrc/cuda)."""
        name, arguments = re.fullmatch(r"(\w+)<(.*)>", self.kernel).groups()
        last = arguments.split(", ")[-1]
        packs = WARP * 4
        if name == "scan_columns_kernel":
            return WARP * int(last)
        if name.startswith("value_loss"):
            return packs * (2 if last == "kColumns" else 4)
        return packs * int(last)


@dataclass(frozen=True)
class Call:
    operator: str
    shape: tuple[int, ...]
    layout: str  # rows, columns or packed
    launches: tuple[Launch, ...]

    @property
    def tokens(self):
        return math.prod(self.shape)

    @property
    def compulsory_bytes(self):
        """Every operand read once and every result written once, fp32 with a 1-byte mask."""
        return {"gae": 17, "value_loss": 13, "value_loss_backward": 17}[self.operator] * self.tokens


def call_of(entry):
    launches = tuple(Launch(**launch) for launch in entry["launches"])
    return Call(entry["operator"], tuple(entry["shape"]), entry["layout"], launches)


def load_counts():
    counts = json.loads(COUNTS.read_text())
    return {part: [call_of(entry) for entry in counts[part]] for part in ("table", "sweep")}


@functools.cache
def resources():
    """{kernel: (threads of the largest block, {architecture: registers}, bytes of shared memory)} from the table of docs/kernels.md."""
    text = KERNELS.read_text()
    architectures = [int(a) for a in re.search(r"registers on sm_([\d ]+)", text)[1].split()]
    found = {}
    for match in re.finditer(r"^\| `(.+?)` \| (\d+) x \d+ \| ([\d ]+) \| (\d+) \|", text, re.MULTILINE):
        registers = dict(zip(architectures, map(int, match[3].split()), strict=True))
        found[match[1]] = (int(match[2]), registers, int(match[4]))
    return found


def resident_blocks(launch, card):
    """That fit one multiprocessor (limits of compute capability 8.0, 9.0 and 10.0: 64 warps, 32 blocks, 65536 registers by 256 per warp)."""
    _, registers, shared = resources()[launch.kernel]
    warps = -(-launch.threads // WARP)
    per_warp = -(-registers[card.architecture] * WARP // 256) * 256
    shared_bytes = (164 if card.architecture == 80 else 228) * 1024
    per_block = -(-(shared + 1024) // 1024) * 1024
    return min(32, 64 // warps, 65536 // (per_warp * warps), shared_bytes // per_block)


# --- the model -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    floor: float  # seconds: launches
    finish: float  # of the loss, by its last block
    bounds: dict[str, float]  # seconds each; the greatest decides

    @property
    def seconds(self):
        return self.floor + self.finish + max(self.bounds.values())

    @property
    def decides(self):
        name = max(self.bounds, key=self.bounds.get)
        return "launch" if self.bounds[name] < self.floor + self.finish else name


def bounds_of_launch(call, launch, card, cached_share):
    """cached_share: of the bytes moved, that which the L2 serves."""
    l2_bandwidth = max(L2_SHARE * L2_BYTES_PER_CYCLE * card.clock, MEMORY_SHARE * card.bandwidth)
    cached = cached_share * launch.bytes_moved
    bandwidth = (launch.bytes_moved - cached) / (MEMORY_SHARE * card.bandwidth) + cached / l2_bandwidth

    # The busiest multiprocessor: what it is given in whole blocks.
    blocks_there = -(-launch.blocks // card.multiprocessors)
    warps_per_block = launch.warps // launch.blocks
    port = blocks_there * launch.bytes_moved / launch.blocks / (PORT_BYTES_PER_CYCLE * card.clock)
    schedulers = min(SCHEDULERS, blocks_there * warps_per_block)
    instructions = launch.warp_instructions / launch.warps
    issue = blocks_there * warps_per_block * instructions / (schedulers * card.issue * card.clock)

    # Each warp in rounds: loads, waits for them, works, stores. With the resident warps this is Little's law; with one it is the chain of a row.
    waves = -(-launch.blocks // (card.multiprocessors * resident_blocks(launch, card)))
    rounds = max(1, math.ceil(call.tokens / (launch.warps * launch.tokens_in_flight)))
    latency = MEMORY_LATENCY if cached_share < 1 else L2_LATENCY
    chain = instructions * CHAIN_CYCLES[call.operator] / card.clock
    return {"bandwidth": bandwidth, "port": port, "instructions": issue, "latency": waves * (rounds * latency + chain)}


def predict(call, card, warm=False):
    """warm: the operands are in the L2, as in a loop that repeats a small call; only for calls that fit (else None)."""
    touched = call.compulsory_bytes
    fits = touched <= L2_RESIDENT_SHARE * card.l2_bytes
    if warm and not fits:
        return None
    floor = LAUNCH + NEXT_LAUNCH * (len(call.launches) - 1)
    finish, bounds = 0.0, {}
    for i, launch in enumerate(call.launches):
        # Rows that are split are read twice; the second time by the last launch, from the L2 where they fit.
        reread = i > 0 and fits
        share = 1.0 if warm else launch.bytes_read / launch.bytes_moved if reread else 0.0
        for name, seconds in bounds_of_launch(call, launch, card, share).items():
            bounds[name] = bounds.get(name, 0.0) + seconds
        if call.operator == "value_loss" and launch.blocks > 1:
            floor += NEXT_LAUNCH  # the memset of the ticket
            finish += FINISH_ROUND_TRIPS * L2_LATENCY
    return Prediction(floor, finish, bounds)


# --- tables ----------------------------------------------------------------------------------------------------------------------

OURS = "fused_critic"  # as the benchmark calls it
TITLES = {"gae": "GAE", "value_loss": "Value loss, forward", "value_loss_backward": "Value loss, backward"}
HEADLINE = next(card for card in CARDS if card.name.startswith("H100"))


def markdown(header, rows):
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"


def shape_name(call):
    if call.layout == "columns":
        return "[{}, {}] time-major".format(*call.shape)
    return f"[{', '.join(map(str, call.shape))}]" + (" packed" if call.layout == "packed" else "")


def name_in_words(launch):
    name, arguments = re.fullmatch(r"(\w+)<(.*)>", launch.kernel).groups()
    if name == "scan_rows_kernel":
        return "warp per row" if arguments.split(", ")[-2] == "1" else "block per row"
    words = {"reduce_chunks_kernel": "split: maps", "scan_chunks_kernel": "split: results", "scan_columns_kernel": "columns"}
    walks = {"kLongRows": "rows", "kShortRows": "short rows", "kColumns": "columns"}
    return words.get(name) or walks.get(arguments.split(", ")[-1], "backward")


def cost_table(calls):
    """What was counted, per launch."""
    rows = []
    for call in calls:
        for launch in call.launches:
            card = HEADLINE
            resident = min(resident_blocks(launch, card) * card.multiprocessors, launch.blocks)
            warps_there = -(-resident // card.multiprocessors) * launch.warps // launch.blocks
            read_per_token = launch.bytes_read / call.tokens
            in_flight = warps_there * min(launch.tokens_in_flight, call.tokens / launch.warps) * read_per_token
            rows.append(
                (
                    f"{TITLES[call.operator]} {shape_name(call)}",
                    name_in_words(launch),
                    f"{launch.blocks} x {launch.threads}",
                    f"{1000 * launch.warp_instructions / call.tokens:.0f}",
                    f"{launch.bytes_moved / call.tokens:.2f}",
                    call.compulsory_bytes // call.tokens,
                    resources()[launch.kernel][1][card.architecture],
                    warps_there,
                    f"{in_flight / 1000:.1f}",
                )
            )
    header = (
        "call",
        "kernel",
        "blocks x threads",
        "instructions per 1000 tokens",
        "bytes moved per token",
        "compulsory, whole call",
        "registers",
        "warps on the busiest multiprocessor",
        "KB in flight there",
    )
    return markdown(header, rows)


def in_microseconds(prediction):
    return "-" if prediction is None else f"{1e6 * prediction.seconds:.1f}"


def time_table(calls, operator, measured):
    rows = []
    for call in calls:
        if call.operator != operator:
            continue
        rows.append(
            (
                shape_name(call),
                f"{call.compulsory_bytes / 1e6:.2f}",
                *(f"{in_microseconds(predict(call, card))} / {in_microseconds(predict(call, card, warm=True))}" for card in CARDS),
                predict(call, HEADLINE).decides,
                measured.get(f"{operator} {shape_name(call)}", "-"),
            )
        )
    seen = "measured, with the forward pass" if operator == "value_loss_backward" else "measured"
    header = ("shape", "MB", *(card.name for card in CARDS), "decided on the H100 by", seen)
    return markdown(header, rows)


def card_table():
    rows = []
    for card in CARDS:
        in_flight = card.bandwidth * MEMORY_LATENCY
        instructions = card.multiprocessors * SCHEDULERS * card.issue * card.clock
        rows.append(
            (
                card.name,
                card.multiprocessors,
                f"{card.clock / 1e9:.2f}",
                f"{card.bandwidth / 1e12:.2f}",
                f"{card.l2_bytes / MB:.0f}",
                f"{in_flight / 1e6:.1f}",
                f"{in_flight / card.multiprocessors / 1e3:.1f}",
                f"{instructions / 1e12:.2f}",
                " / ".join(f"{1000 * instructions * n / (MEMORY_SHARE * card.bandwidth):.0f}" for n in (13, 17)),
            )
        )
    header = (
        "card",
        "multiprocessors",
        "clock, GHz",
        "memory, TB/s",
        "L2, MB",
        "to keep in flight, MB",
        "the same per multiprocessor, KB",
        "warp instructions, 10^12/s",
        "balance: instructions per 1000 tokens of 13 / 17 bytes",
    )
    return markdown(header, rows)


def model_table():
    """The terms of Prediction and the assumptions that they rest on."""
    us = 1e6
    rows = (
        ("launches", f"{us * LAUNCH:.1f} us, and {us * NEXT_LAUNCH:.1f} us for each further launch or memset of the call",
         "queued back to back on a stream or in a graph, and the host keeps up"),
        ("finish", f"the loss' last block: {FINISH_ROUND_TRIPS} round trips to the L2 (fence and ticket, partials, result)",
         f"{us * L2_LATENCY:.2f} us each, under load"),
        ("bandwidth", f"bytes moved / ({MEMORY_SHARE:.0%} of the memory's bandwidth)", "what copies reach"),
        ("", f"with operands in the L2: bytes moved / ({L2_SHARE:.0%} of {L2_BYTES_PER_CYCLE} bytes per cycle), or as from memory if that is faster",
         f"the A100's figure taken for all; a call finds its operands there if it touches at most {L2_RESIDENT_SHARE:.0%} of the L2"),
        ("port", f"bytes of the busiest multiprocessor / {PORT_BYTES_PER_CYCLE} bytes per cycle", "between a multiprocessor and the L2"),
        ("instructions", f"warp instructions of the busiest multiprocessor / ({SCHEDULERS} schedulers x issue rate x clock)",
         "issue rates: " + ", ".join(f"{card.name} {card.issue}" for card in CARDS)),
        ("latency", "waves x (rounds x latency + chain)",
         f"latency {us * MEMORY_LATENCY:.2f} us to memory, {us * L2_LATENCY:.2f} us to the L2, under load; chain: {CHAIN_CYCLES['gae']} cycles per "
         f"instruction of a warp in GAE, {CHAIN_CYCLES['value_loss']} in the loss, whose tokens are independent"),
    )  # fmt: skip
    return markdown(("term", "is", "assumptions"), rows)


def tables(measured):
    calls = load_counts()["table"]
    yield "cards", card_table()
    yield "model", model_table()
    yield "costs", cost_table(calls)
    for operator in TITLES:
        yield operator, time_table(calls, operator, measured)


def with_table(text, name, lines):
    begin, end = f"<!-- begin: predicted {name} -->", f"<!-- end: predicted {name} -->"
    head, found, rest = text.partition(begin)
    if not found:
        raise SystemExit(f"{DOCUMENT}: {begin} is missing")
    return head + begin + "\n" + "\n".join(lines) + "\n" + end + rest.partition(end)[2]


def renewed(text, measured):
    for name, lines in tables(measured):
        text = with_table(text, name, lines)
    return text


def committed_measured():
    return json.loads(MEASURED.read_text()) if MEASURED.exists() else {}


def read_measured(path):
    """{operator and shape, as in the tables: "cold / warm" microseconds} from the results.json of ``python -m benchmarks --device cuda``.

    The benchmark times the loss forward and backward together; that is the figure under value_loss_backward.
    """
    found = {}
    for result in json.loads(Path(path).read_text())["results"]:
        match = re.fullmatch(r"(gae|loss)(-time-major)?-(\d+)x(\d+)", result["name"])
        if match is None:
            continue
        operator = "gae" if match[1] == "gae" else "value_loss_backward"
        shape = f"[{match[3]}, {match[4]}]" + (" time-major" if match[2] else "")
        seconds = {row["cache"]: row["median"] for row in result["rows"] if row["contender"] == OURS}
        found[f"{operator} {shape}"] = " / ".join(f"{1e6 * seconds[cache]:.1f}" if cache in seconds else "-" for cache in ("cold", "warm"))
    return found


# --- plot ------------------------------------------------------------------------------------------------------------------------


def plot(path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    calls = load_counts()["sweep"]
    figure, all_axes = pyplot.subplots(1, len(TITLES), figsize=(14, 4.6), sharey=True, layout="constrained")
    for axes, (operator, title) in zip(all_axes, TITLES.items(), strict=True):
        chosen = [call for call in calls if call.operator == operator]
        tokens = [call.tokens for call in chosen]
        for card, colour in zip(CARDS, ("tab:green", "tab:blue", "tab:orange", "tab:red"), strict=True):
            axes.plot(tokens, [1e6 * predict(call, card).seconds for call in chosen], color=colour, marker=".", label=card.name)
        cold = [predict(call, HEADLINE) for call in chosen]
        axes.plot(tokens, [1e6 * (p.floor + p.finish) for p in cold], color="0.35", ls=":", label="H100: launches, finish")
        for name, style in (("bandwidth", "--"), ("instructions", "-."), ("latency", (0, (1, 3)))):
            axes.plot(tokens, [1e6 * p.bounds[name] for p in cold], color="0.35", ls=style, lw=1, label=f"H100: {name}")
        axes.set(yscale="log", xlabel="tokens per card (rows of 1024)", title=title, ylim=(0.3, 400))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.25)
    all_axes[0].set_ylabel("predicted microseconds, operands from memory")
    all_axes[0].legend(fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


# --- counting --------------------------------------------------------------------------------------------------------------------

TABLE_SHAPES = (
    ((64, 512), "rows"),
    ((2048, 128), "rows"),
    ((256, 1024), "rows"),
    ((64, 4096), "rows"),
    ((64, 8192), "rows"),
    ((64, 32768), "rows"),
    ((1, 2**20), "rows"),
    ((128, 4096), "columns"),
    ((256000,), "packed"),
)
SWEEP_SHAPES = tuple(((2**n, 1024), "rows") for n in range(15))
PACKED_LENGTH = 1000


def counted(operator, shape, layout):
    """One call on the simulated GPU, as an entry of counts.json."""
    import fakecuda
    import fused_critic
    import torch

    generator = torch.Generator().manual_seed(0)
    x, values, old_values = (torch.randn(shape, generator=generator).cuda() for _ in range(3))
    mask = (torch.rand(shape, generator=generator) >= MASKED).cuda()
    options = {"columns": {"time_dim": 0}, "rows": {}}.get(layout)
    if options is None:
        options = {"cu_seqlens": torch.arange(0, math.prod(shape) + 1, PACKED_LENGTH).cuda()}
    start = len(fakecuda.launches())
    if operator == "gae":
        fused_critic.gae(x, values, mask, gamma=0.99, lam=0.95, **options)
    else:
        loss = fused_critic.value_loss(values.requires_grad_(operator == "value_loss_backward"), old_values, x, mask, **options).loss
        if operator == "value_loss_backward":
            start = len(fakecuda.launches())
            loss.backward()
    launches = [
        Launch(
            kernel=short_name(launch["kernel"]),
            blocks=math.prod(launch["grid"]),
            threads=math.prod(launch["block"]),
            warp_instructions=launch["warp_insts"],
            bytes_read=SECTOR * launch["gld_sectors"],
            bytes_written=SECTOR * launch["gst_sectors"],
        )
        for launch in fakecuda.launches()[start:]
    ]
    return {"operator": operator, "shape": shape, "layout": layout, "launches": [asdict(launch) for launch in launches]}


def count(path):
    """Runs every call on the simulated GPU (python -m fakecuda run) and writes what it counted."""
    counts = {
        part: [counted(operator, *shape) for operator in TITLES for shape in shapes]
        for part, shapes in (("table", TABLE_SHAPES), ("sweep", SWEEP_SHAPES))
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(counts, indent=1) + "\n")


def short_name(demangled):
    """As in docs/kernels.md: without return type, namespaces and parameters, enumerators by name."""
    enumerators = {"Access": ("kPlain", "kRegular", "kGeneral"), "Walk": ("kLongRows", "kShortRows", "kColumns")}
    name = demangled[: demangled.index(">(") + 1].replace("(anonymous namespace)::", "")
    name = re.sub(r"\w+::(?=\w)", "", name).removeprefix("void ")
    return re.sub(r"\((\w+)\)(\d+)", lambda match: enumerators[match[1]][int(match[2])], name)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help=f"write {COUNTS.relative_to(ROOT)}; under python -m fakecuda run")
    parser.add_argument(
        "--measured", metavar="FILE", help="results.json of python -m benchmarks --device cuda, for the column of that name"
    )
    arguments = parser.parse_args()
    if arguments.count:
        count(COUNTS)
        return
    if arguments.measured:
        MEASURED.write_text(json.dumps(read_measured(arguments.measured), indent=1) + "\n")
    DOCUMENT.write_text(renewed(DOCUMENT.read_text(), committed_measured()))
    plot(PLOT)
    print(f"wrote {DOCUMENT.relative_to(ROOT)} and {PLOT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
