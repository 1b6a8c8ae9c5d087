"""Instructions of the machine code that ptxas made of the kernels, per token: the table "machine code" of docs/performance.md.

Machine code cannot be executed without a GPU, so this is read off the disassembly: the shortest path through a kernel's control flow, from
its entry to its exit, on which a warp makes all the accesses of one tile (or pass) of full, unmasked packs, and what one tile more adds.
Needs cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or the CUDA toolkit), and the built library:

    python tests/machine_code.py --library .venv-cuda/lib/python*/site-packages/fused_critic/_C*.so --write
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import os
import re
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
ARCHITECTURES = (80, 90, 100)
WARP, PACK = 32, 4
PASS_ARITHMETIC = 150  # instructions: in the loss a pass of unmasked tokens is the one piece of straight code that has so many


@dataclass(frozen=True)
class Work:
    """What a thread does at least on the way: accesses, by instruction, and passes of arithmetic."""

    wide_loads: int = 0  # of 16 bytes
    narrow_loads: int = 0  # smaller ones, through the read-only path
    wide_stores: int = 0
    narrow_stores: int = 0
    passes: int = 0  # of straight code with PASS_ARITHMETIC instructions of float32 arithmetic

    def __mul__(self, n):
        return Work(*(n * x for x in self.counts))

    @property
    def counts(self):
        return (self.wide_loads, self.narrow_loads, self.wide_stores, self.narrow_stores, self.passes)


@dataclass(frozen=True)
class Kernel:
    title: str
    symbol: str  # regular expression
    tokens: int  # per thread and tile
    work: Work  # per tile
    repeats: bool = True  # whether a warp walks further tiles


# A wide load of the backward pass is that of its residuals. Without `passes` the shortest path through the loss would be the one that skips a pass because all of it is masked.
KERNELS = (
    Kernel("GAE, block per row, no mask", r"scan_rows_kernel.*7GaeScanIfLb1E.*ELi4ELi2E", 2 * PACK, Work(4, 0, 4)),
    Kernel("GAE, block per row, mask", r"scan_rows_kernel.*7GaeScanIfLb0E.*AccessE0ELi4ELi2E", 2 * PACK, Work(4, 2, 4)),
    Kernel(
        "GAE, warp per row of up to 128, mask", r"scan_rows_kernel.*7GaeScanIfLb0E.*AccessE0ELi1ELi1E", PACK, Work(2, 1, 2), repeats=False
    ),
    Kernel("GAE, warp per longer row, mask", r"scan_rows_kernel.*7GaeScanIfLb0E.*AccessE0ELi1ELi2E", 2 * PACK, Work(4, 2, 4)),
    Kernel("GAE, split rows: maps, mask", r"reduce_chunks_kernel.*7GaeScanIfLb0E.*AccessE0ELi2E", 2 * PACK, Work(4, 2)),
    Kernel("GAE, split rows: results, mask", r"scan_chunks_kernel.*7GaeScanIfLb0E.*AccessE0ELi2E", 2 * PACK, Work(4, 2, 4)),
    Kernel("GAE, columns, no mask", r"scan_columns_kernel.*7GaeScanIfLb1E.*AccessE0ELi16E", 16, Work(0, 32, 0, 32)),
    Kernel("GAE, columns, mask", r"scan_columns_kernel.*7GaeScanIfLb0E.*AccessE0ELi8E", 8, Work(0, 24, 0, 16)),
    Kernel("value loss, rows, no mask", r"value_loss_kernelIfLb1E.*WalkE0E", 4 * PACK, Work(12, 0, passes=1)),
    Kernel("value loss, short rows, no mask", r"value_loss_kernelIfLb1E.*WalkE1E", 4 * PACK, Work(12, 0, passes=1)),
    Kernel("value loss, columns, no mask", r"value_loss_kernelIfLb1E.*WalkE2E", 2 * PACK, Work(6, 0, passes=1)),
    Kernel("value loss, backward, no mask", r"value_loss_backward_kernelIfLb1E", 4 * PACK, Work(13, 0, 4), repeats=False),
)


def tool_environment():
    """cuobjdump calls nvdisasm: both from the wheels, if they are installed, else from PATH."""
    wheels = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin"))
    return {**os.environ, "PATH": os.pathsep.join([*map(str, wheels), os.environ["PATH"]])}


def disassemble(library, architecture):
    """-> {symbol: [(address, instruction)]}"""
    text = subprocess.run(
        ["cuobjdump", "-sass", "-arch", f"sm_{architecture}", str(library)],
        env=tool_environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    functions = {}
    for part in text.split("Function : ")[1:]:
        symbol = part.split(maxsplit=1)[0]
        functions[symbol] = [(int(at, 16), code.strip()) for at, code in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", part)]
    return functions


def work_of(code):
    """(wide loads, narrow loads, wide stores, narrow stores, arithmetic) of one instruction."""
    name = code.split(maxsplit=1)[1].split(maxsplit=1)[0] if code.startswith("@") else code.split(maxsplit=1)[0]
    wide = ".128" in name
    load, store = name.startswith("LDG") and "STRONG" not in name, name.startswith("STG")  # strong loads are those of partials
    return (
        load and wide,
        load and not wide and ".CONSTANT" in name,
        store and wide,
        store and not wide,
        name.split(".")[0] in ("FADD", "FMUL", "FFMA", "FMNMX"),
    )


@dataclass
class Block:
    """Straight code."""

    length: int  # instructions
    work: tuple[int, ...]
    successors: list[int]
    indirect: bool  # ends with a jump to one of several targets
    ends: bool


def control_flow(instructions):
    """-> [Block]. A call counts as one instruction; ptxas uses calls as jumps, too."""
    index = {at: i for i, (at, _) in enumerate(instructions)}
    jumps = {}
    for i, (_, code) in enumerate(instructions):
        if match := re.search(r"\b(?:BRA|CALL)\b.*?(0x[0-9a-f]+)$", code):
            jumps[i] = index[int(match[1], 16)]
    stops = {i for i, (_, code) in enumerate(instructions) if re.search(r"^(@\S+\s+)?(BRA|EXIT|BRX|RET|CALL|BPT)\b", code)}
    starts = sorted({0, *jumps.values(), *(i + 1 for i in stops if i + 1 < len(instructions))})
    block_of = {start: n for n, start in enumerate(starts)}
    blocks = []
    for start, end in itertools.pairwise([*starts, len(instructions)]):
        code = instructions[end - 1][1]
        bare = re.sub(r"^@\S+\s+", "", code)
        follows = end - 1 not in stops or code.startswith("@") or bare.startswith("CALL") or ("," in bare and bare.startswith("BRA"))
        successors = [block_of[jumps[end - 1]]] if end - 1 in jumps else []
        successors += [block_of[end]] if follows and end in block_of else []
        *accesses, arithmetic = map(sum, zip(*(work_of(code) for _, code in instructions[start:end]), strict=True))
        work = (*accesses, int(arithmetic >= PASS_ARITHMETIC))
        blocks.append(Block(end - start, work, successors, bare.startswith("BRX"), bare.startswith("EXIT")))

    # The targets of an indirect jump are not in the text: they are the blocks behind it that nothing else leads to.
    reached, jump = {0}.union(*(block.successors for block in blocks)), None
    for n, block in enumerate(blocks):
        if n not in reached and jump is not None:
            jump.successors.append(n)
        jump = block if block.indirect else jump
    return blocks


def shortest(blocks, work):
    """Fewest instructions from the first block to an exit with at least the work done."""
    needed = work.counts

    def entered(state, block):
        return tuple(min(n, done + more) for n, done, more in zip(needed, state, blocks[block].work, strict=True))

    first = (0, entered((0,) * len(needed), 0))
    best, heap = {first: blocks[0].length}, [(blocks[0].length, first)]
    while heap:
        length, (block, done) = heapq.heappop(heap)
        if best[block, done] < length:
            continue
        if blocks[block].ends and done == needed:
            return length
        for successor in blocks[block].successors:
            state = (successor, entered(done, successor))
            if length + blocks[successor].length < best.get(state, length + blocks[successor].length + 1):
                best[state] = length + blocks[successor].length
                heapq.heappush(heap, (best[state], state))
    raise SystemExit("no path does the work")


def table(library):
    code = {architecture: disassemble(library, architecture) for architecture in ARCHITECTURES}
    yield "| kernel | tokens per warp and tile | one tile, whole kernel, on sm_80 90 100 | each further tile |"
    yield "|---|---|---|---|"
    for kernel in KERNELS:
        per_thousand, further = [], []
        for architecture in ARCHITECTURES:
            (symbol,) = [name for name in code[architecture] if re.search(kernel.symbol, name)]
            blocks = control_flow(code[architecture][symbol])
            one = shortest(blocks, kernel.work)
            tokens = WARP * kernel.tokens
            per_thousand.append(f"{1000 * one / tokens:.0f}")
            if kernel.repeats:
                further.append(f"{1000 * (shortest(blocks, kernel.work * 2) - one) / tokens:.0f}")
        yield f"| {kernel.title} | {WARP * kernel.tokens} | {' '.join(per_thousand)} | {' '.join(further) or '-'} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True, type=Path, help="the built extension")
    parser.add_argument("--write", action="store_true", help="renew the table of docs/performance.md")
    arguments = parser.parse_args()
    lines = "\n".join(table(arguments.library))
    print(lines)
    if arguments.write:
        begin, end = "<!-- begin: machine code -->", "<!-- end: machine code -->"
        head, found, rest = DOCUMENT.read_text().partition(begin)
        if not found:
            raise SystemExit(f"{DOCUMENT}: {begin} is missing")
        DOCUMENT.write_text(head + begin + "\n" + lines + "\n" + end + rest.partition(end)[2])


if __name__ == "__main__":
    main()
