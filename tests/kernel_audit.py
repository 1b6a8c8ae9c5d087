"""Static gates and coverage of the CUDA kernels, and the tables of docs/kernels.md.

Reads what the compiler said about every instantiation (the build's log, with -Xptxas=-v), its PTX (in the built library) and the merged
report of the simulated runs. `--write` renews the tables of docs/kernels.md; without it, tables that are out of date are a failure.
`make test-cuda` calls it last.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import test_kernel_costs as costs

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "kernels.md"
FATBIN_MAGIC = (0xBA55ED50).to_bytes(4, "little")
PTX_ARCHITECTURE = 90  # whose PTX is looked at for vector accesses, and which the main card of the simulation runs


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ programming guide, technical specifications per compute capability)."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536
    register_unit: int = 256  # per warp
    shared_unit: int = 1024  # what a block's shared memory is rounded up to, with the kilobyte that the system keeps per block


KB = 1024
MULTIPROCESSORS = {
    75: Multiprocessor(warps=32, blocks=16, shared_bytes=64 * KB),
    80: Multiprocessor(warps=64, blocks=32, shared_bytes=164 * KB),
    86: Multiprocessor(warps=48, blocks=16, shared_bytes=100 * KB),
    89: Multiprocessor(warps=48, blocks=24, shared_bytes=100 * KB),
    90: Multiprocessor(warps=64, blocks=32, shared_bytes=228 * KB),
    100: Multiprocessor(warps=64, blocks=32, shared_bytes=228 * KB),
    120: Multiprocessor(warps=48, blocks=24, shared_bytes=100 * KB),
}

# Warps that are resident on a multiprocessor at least, in float and in double. What hides the latency of memory is bytes in flight: eight
# warps of the loss, each with four packs of three operands and a mask per lane, are 53 KB per multiprocessor.
RESIDENT_WARPS = {
    "value_loss_kernel": {"float": 8, "double": 8},
    "value_loss_backward_kernel": {"float": 16, "double": 16},
    "value_loss_options_kernel": {"float": 8, "double": 8},
    "value_loss_options_backward_kernel": {"float": 12, "double": 12},
    "scan_rows_kernel": {"float": 16, "double": 8},
    "reduce_chunks_kernel": {"float": 16, "double": 8},
    "scan_chunks_kernel": {"float": 16, "double": 8},
    "scan_columns_kernel": {"float": 16, "double": 8},
}

# Kernels that store per token, in the instantiations that access whole packs.
STORES_TOKENS = ("value_loss_backward_kernel", "value_loss_options_backward_kernel", "scan_rows_kernel", "scan_chunks_kernel")
SCALAR_ARGUMENTS = ("kGeneral", "scan_columns_kernel")  # element accesses, or one element per lane and step

# Source lines with code that no launch can run: (file, a part of the line before and the line) -> reason.
LINES_EXCEPTED = {
    ("csrc/cuda/operand.cuh", "case DType::kInt32: return 4;"): "regular rows: numbers of four bytes that are not float32, which are none",
    ("csrc/cuda/value_loss.cu", "live_bits(live), (plan.access.native & kOutputBit) != 0); }"): "short rows: a whole pass of plain tensors "
    "is a whole row there, whose length is then a multiple of the pack, and the output is aligned; the jump behind unaligned stores",
}
KERNELS_EXCEPTED: dict[str, str] = {}


@dataclass
class Resources:
    """What ptxas says about one kernel on one architecture."""

    registers: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0


@dataclass
class Kernel:
    symbol: str
    name: str = ""  # value_loss_kernel<float, true, false>
    resources: dict[int, Resources] = field(default_factory=dict)  # by architecture
    max_threads: int = 0
    min_blocks: int = 1
    wide_loads: int = 0  # 16-byte accesses to global memory in the PTX
    wide_stores: int = 0
    launches: int = 0

    @property
    def family(self):
        return self.name.split("<")[0]

    @property
    def precision(self):
        return "double" if "double" in self.name else "float"

    def resident_warps(self, architecture):
        """Warps of blocks of the largest size that fit one multiprocessor."""
        limit, used = MULTIPROCESSORS[architecture], self.resources[architecture]
        warps = -(-self.max_threads // 32)
        registers = -(-used.registers * 32 // limit.register_unit) * limit.register_unit * warps
        shared = -(-(used.shared_bytes + KB) // limit.shared_unit) * limit.shared_unit
        return warps * min(limit.blocks, limit.warps // warps, limit.registers // registers, limit.shared_bytes // shared)


def enumerators():
    """{"Access": ["kPlain", ...]} for every enum class in the CUDA sources."""
    found = {}
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cuh", ".cu"):
            for name, body in re.findall(r"enum class (\w+)[^{]*\{([^}]*)\}", path.read_text()):
                body = re.sub(r"//[^\n]*", "", body)
                found[name] = [part.split("=")[0].strip() for part in body.split(",") if part.strip()]
    return found


def short_name(demangled, enums):
    """Without return type, namespaces and parameters, enumerators by name."""
    name = demangled[: demangled.index(">(") + 1].replace("(anonymous namespace)::", "")
    name = re.sub(r"\w+::(?=\w)", "", name).removeprefix("void ")
    return re.sub(r"\((\w+)\)(\d+)", lambda match: enums[match[1]][int(match[2])], name)


def demangle(symbols):
    """By c++filt, which comes with the compiler."""
    symbols = sorted(symbols)
    names = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(zip(symbols, names, strict=True))


def read_resources(log):
    """-> {symbol: {architecture: Resources}} from the lines of ptxas."""
    found = defaultdict(dict)
    current = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\d+)", line):
            current = found[match[1]].setdefault(int(match[2]), Resources())
        elif current is None:
            continue
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.stack_bytes, current.spill_bytes = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            current.registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current.shared_bytes = int(shared[1]) if shared else 0
            current = None
    return found


def read_ptx(library):
    """PTX of every kernel in the library: {symbol: text}."""
    from fakecuda.fatbin import Fatbin

    data = Path(library).read_bytes()
    buffer = ctypes.create_string_buffer(data, len(data))
    found, at = {}, data.find(FATBIN_MAGIC)
    while at >= 0:
        text = Fatbin(ctypes.addressof(buffer) + at).ptx(PTX_ARCHITECTURE)
        for part in (text or "").split(".entry ")[1:]:
            symbol, _, rest = part.partition("(")
            found[symbol] = rest
        at = data.find(FATBIN_MAGIC, at + 4)
    return found


def wide_accesses(body, direction):
    """16-byte loads or stores of global memory."""
    count = 0
    for vector, bits in re.findall(rf"\b{direction}\.global(?:\.\w+)*?\.v([24])\.[a-z](\d+)", body):
        count += int(vector) * int(bits) == 128
    return count


def collect(log, library, report):
    ptx, resources = read_ptx(library), read_resources(log)
    names, enums = demangle(ptx), enumerators()
    launches = defaultdict(int)
    for launch in report["launches"]:
        launches[launch["symbol"]] += launch["status"] == "ok"
    kernels = []
    for symbol, body in ptx.items():
        image = report["images"][names[symbol]]
        kernel = Kernel(symbol, short_name(names[symbol], enums), resources.get(symbol, {}), launches=launches[symbol])
        kernel.max_threads, kernel.min_blocks = image["max_threads"] or 0, image["min_blocks_per_sm"] or 1
        kernel.wide_loads, kernel.wide_stores = wide_accesses(body, "ld"), wide_accesses(body, "st")
        kernels.append(kernel)
    return sorted(kernels, key=lambda kernel: kernel.name)


def static_failures(kernels):
    for kernel in kernels:
        missing = sorted(set(MULTIPROCESSORS) - set(kernel.resources))
        if missing:
            yield f"{kernel.name}: not compiled for {missing}"
            continue
        if not kernel.max_threads:
            yield f"{kernel.name}: no __launch_bounds__"
            continue
        for architecture, used in sorted(kernel.resources.items()):
            limit = MULTIPROCESSORS[architecture]
            where = f"{kernel.name} on sm_{architecture}"
            if used.spill_bytes or used.stack_bytes:
                yield f"{where}: {used.spill_bytes} bytes of spills, {used.stack_bytes} bytes of local memory"
            resident, planned = kernel.resident_warps(architecture), kernel.min_blocks * -(-kernel.max_threads // 32)
            if resident < planned:
                yield f"{where}: {used.registers} registers, {used.shared_bytes} bytes shared: {resident} warps, __launch_bounds__ plans {planned}"
            if used.shared_bytes > 48 * KB or used.shared_bytes * kernel.min_blocks > limit.shared_bytes:
                yield f"{where}: {used.shared_bytes} bytes of shared memory"
            floor = RESIDENT_WARPS[kernel.family][kernel.precision]
            if resident < floor:
                yield f"{where}: {resident} resident warps, at least {floor} are stated"
        if not any(word in kernel.name for word in SCALAR_ARGUMENTS):
            if not kernel.wide_loads:
                yield f"{kernel.name}: no 16-byte load"
            if kernel.family in STORES_TOKENS and not kernel.wide_stores:
                yield f"{kernel.name}: no 16-byte store"


def coverage_failures(kernels, report):
    for kernel in kernels:
        if not kernel.launches and kernel.name not in KERNELS_EXCEPTED:
            yield f"{kernel.name}: never launched"
        if kernel.launches and kernel.name in KERNELS_EXCEPTED:
            yield f"{kernel.name}: launched, but listed as an exception"
    unused = set(LINES_EXCEPTED)
    for place, count in sorted(report["lines"].items()):
        path, _, number = place.rpartition(":")
        path = path[path.rindex("csrc/") :] if "csrc/" in path else ""
        path = re.sub(r"\w+/\.\./", "", path)
        if not path or count or number == "0":  # 0: instructions that the compiler gives no line
            continue
        source = (ROOT / path).read_text().splitlines()
        text = source[int(number) - 1].strip()
        context = f"{source[int(number) - 2].strip()} {text}"
        excepted = [key for key in LINES_EXCEPTED if key[0] == path and key[1] in context]
        unused -= set(excepted)
        if not excepted:
            yield f"{path}:{number}: never run: {text}"
    for path, text in sorted(unused):
        yield f"{path}: {text!r} is listed as never run, but ran or is gone"


def markdown(header, rows):
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"


def compiler(text):
    """The release of nvcc that a build's log, or the document, names."""
    match = re.search(r"nvcc (\d+\.\d+)", text)
    return match[1] if match else None


def instantiation_table(kernels, release):
    """Every instantiation with its resources. Launches are how often the simulated runs executed it."""
    architectures = sorted(MULTIPROCESSORS)
    rows = []
    for kernel in kernels:  # least: over the architectures
        registers = " ".join(str(kernel.resources[a].registers) for a in architectures)
        share = min(100 * kernel.resident_warps(a) // MULTIPROCESSORS[a].warps for a in architectures)
        warps = min(kernel.resident_warps(a) for a in architectures)
        shared = max(kernel.resources[a].shared_bytes for a in architectures)
        bounds = f"{kernel.max_threads} x {kernel.min_blocks}"
        rows.append(
            (
                f"`{kernel.name}`",
                bounds,
                registers,
                shared,
                f"{warps} ({share}%)",
                f"{kernel.wide_loads} / {kernel.wide_stores}",
                kernel.launches,
            )
        )
    header = (
        "instantiation",
        "threads x blocks",
        "registers on sm_" + " ".join(map(str, architectures)),
        "shared bytes",
        "resident warps, least",
        "16-byte loads / stores",
        "launches",
    )
    yield f"Compiled by nvcc {release}."
    yield ""
    yield from markdown(header, rows)


def cost_table(report):
    by_test = defaultdict(list)
    for launch in report["launches"]:
        if launch["test"] and "test_kernel_costs.py::test_cost[" in launch["test"]:
            by_test[re.search(r"\[(.*)\]", launch["test"])[1]].append(launch)
    rows = []
    for case in costs.CASES:
        # The backward case runs the forward kernel first, for its input.
        launches = [launch for launch in by_test[case.name] if any(kernel + "<" in launch["kernel"] for kernel in case.kernels)]
        cost = costs.Cost.of(case, launches)
        limit = "" if case.instructions is None else case.instructions
        efficiency = f"{min(cost.load_efficiency, 1):.1%} / {cost.store_efficiency:.1%}"
        shape = ", ".join(map(str, case.shape))
        rows.append(
            (case.name, f"[{shape}]", f"{cost.instructions:.0f}", limit, f"{cost.bytes_moved:.2f}", case.compulsory_bytes, efficiency)
        )
    header = ("case", "shape", "instructions", "limit", "bytes", "compulsory", "load / store efficiency")
    return markdown(header, rows)


def with_table(text, name, table):
    begin, end = f"<!-- table: {name} -->", "<!-- end of table -->"
    head, found, rest = text.partition(begin)
    if not found:
        raise SystemExit(f"{DOCUMENT}: {begin} is missing")
    return head + begin + "\n" + "\n".join(table) + "\n" + end + rest.partition(end)[2]


def without_launches(text):
    """The last column, which changes with every test, does not make the document out of date."""
    return re.sub(r"\| \d+ \|$", "|", text, flags=re.MULTILINE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", required=True, type=Path, help="output of the build, with NVCC_APPEND_FLAGS=-Xptxas=-v")
    parser.add_argument("--library", required=True, type=Path, help="the built extension")
    parser.add_argument("--report", required=True, type=Path, help="merged report of the simulated runs")
    parser.add_argument("--write", action="store_true", help="renew the tables of docs/kernels.md")
    arguments = parser.parse_args()

    report = json.loads(arguments.report.read_text())
    log = arguments.log.read_text()
    kernels = collect(log, arguments.library, report)
    failures = list(itertools.chain(static_failures(kernels), coverage_failures(kernels, report)))
    failures += [f"{issue['kind']}: {issue['text']}" for issue in report["issues"]]

    if any("not compiled" in failure for failure in failures):  # no table can be made; the log lacks what an earlier build said
        raise SystemExit("\n".join(failures))
    old, release = DOCUMENT.read_text(), compiler(log)
    new = with_table(with_table(old, "instantiations", instantiation_table(kernels, release)), "costs", cost_table(report))
    if arguments.write:
        DOCUMENT.write_text(new)
    elif compiler(old) != release:
        print(f"{DOCUMENT.relative_to(ROOT)} was written for nvcc {compiler(old)}, this is {release}: not compared")
    elif without_launches(new) != without_launches(old):
        failures.append(f"{DOCUMENT.relative_to(ROOT)} is out of date: repeat with --write and commit it")

    print(f"{len(kernels)} kernels, {sum(kernel.launches for kernel in kernels)} launches, {len(failures)} failures")
    for failure in failures:
        print(f"FAIL {failure}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
