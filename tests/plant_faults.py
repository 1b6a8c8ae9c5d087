"""Breaks the CUDA code on purpose, one fault at a time, and reports whether the tests notice: what the suite itself is worth.

    .venv-cuda/bin/python tests/plant_faults.py            # after make test-cuda; about a minute per fault
    .venv-cuda/bin/python tests/plant_faults.py barrier    # those whose name contains "barrier"

Every fault is an edit of one place in a copy of the sources, which is built for one architecture and tested on the simulated device. A
fault whose text is not found exactly once is an error: the source has moved on, and so must the fault.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import simulate

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "faults"
COPIED = ("csrc", "python", "tests", "setup.py", "build_config.py", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Fault:
    name: str
    file: str  # under csrc
    old: str
    new: str
    tests: tuple[str, ...]  # arguments of pytest: the tests that look at this


LOSS, GAE = ("tests/test_value_loss.py",), ("tests/test_gae.py",)
LOSS_EXAMPLES = (*LOSS, "-k", "test_shapes or masked_contents")  # a property test that fails shrinks for minutes where it is simulated
SCAN, VTRACE = ("tests/test_reverse_scan.py", "-k", "test_shapes"), ("tests/test_vtrace.py", "-k", "test_shapes or masked_contents")
STREAMS = ("tests/test_torch_integration.py", "-k", "side_stream or second_device")

FAULTS = (
    Fault(
        "a dropped barrier: the maps of a row's warps",
        "cuda/scan.cuh",
        "    __syncthreads();\n  }\n  __device__ __forceinline__ Affine<T> map(int rank)",
        "  }\n  __device__ __forceinline__ Affine<T> map(int rank)",
        GAE,
    ),
    Fault(
        "off by one in a tail: the pack after a row's last",
        "cuda/scan.cuh",
        "kFull || left > k * kWarpSize",
        "kFull || left >= k * kWarpSize",
        GAE,
    ),
    Fault(
        "a wrong shuffle mask: the scan of a warp",
        "cuda/scan.cuh",
        "a|p, %0, %2, %3, 0xffffffff;",
        "a|p, %0, %2, %3, 0x7fffffff;",
        GAE,
    ),
    Fault(
        "a 32-bit offset: the rows of GAE's inputs",
        "cuda/scan.cuh",
        "return advance(static_cast<const char*>(data), r, row_bytes);",
        "return static_cast<const char*>(data) + static_cast<int>(r * row_bytes);",
        (*GAE, "-k", "offsets"),
    ),
    Fault(
        "a launch without the stream: GAE",
        "cuda/scan.cuh",
        "<<<scan_grid(seqs), G::kRowThreads, 0, stream>>>",
        "<<<scan_grid(seqs), G::kRowThreads>>>",
        STREAMS,
    ),
    Fault(
        "a missing device guard",
        "host.h",
        "  const c10::cuda::CUDAGuard guard(device);\n",
        "",
        STREAMS,
    ),
    Fault(
        "reading a masked value: GAE",
        "cuda/gae.cu",
        "g = step ? next : g;",
        "g = next;",
        GAE,
    ),
    Fault(
        "reading a masked value: V-trace",
        "cuda/vtrace.cu",
        "a = t.valid ? s.delta + s.factor * a : a;",
        "a = s.delta + s.factor * a;",
        VTRACE,
    ),
    Fault(
        "a trace cut between threads: V-trace's policy gradient",
        "cuda/vtrace.cu",
        "t.pg_power = s.pg_slope * power;",
        "t.pg_power = s.pg_slope;",
        VTRACE,
    ),
    Fault(
        "reading past the end of a row: the reverse scan's adjoint",
        "cuda/reverse_scan.cu",
        "carry = live ? factor * tokens[i].p : carry;",
        "carry = factor * tokens[i].p;",
        SCAN,
    ),
    Fault(
        "off by one: what the gradient of a decay is multiplied by",
        "cuda/reverse_scan.cu",
        "out[i] = p_.shifted ? next : y;",
        "out[i] = y;",
        SCAN,
    ),
    Fault(
        "a wrong hand-over between warps: GAE",
        "cuda/scan.cuh",
        "enter = i < static_cast<int>(threadIdx.x / kWarpSize) ? x : enter;",
        "enter = i <= static_cast<int>(threadIdx.x / kWarpSize) ? x : enter;",
        GAE,
    ),
    Fault(
        "a wrong hand-over between tiles: a warp's next tile",
        "cuda/scan.cuh",
        "x = w.from_zero(from_last(leaving[K - 1], group));",
        "x = w.from_zero(from_last(leaving[0], group));",
        GAE,
    ),
    Fault(
        "a wrong hand-over between warps: a map that counts from its warp's origin",
        "cuda/scan.cuh",
        "    if constexpr (kIsCentred<Op>) m = counted_from_zero(m, origin);\n",
        "",
        GAE,
    ),
    Fault(
        "a wrong hand-over between blocks: the chunk just before is left out",
        "cuda/scan.cuh",
        "if (i < chunk) m[0] = maps_before[i];",
        "if (i < chunk - 1) m[0] = maps_before[i];",
        GAE,
    ),
    Fault(
        "a vector load from a misaligned view",
        "cuda/packed.cuh",
        "((own.phase - reference.phase) & (kVec - 1)) == 0 && ",
        "",
        (*GAE, *LOSS),
    ),
    Fault(
        "a rung that returns another's result: one tile for rows of two",
        "cuda/scan.cuh",
        "steps <= G::kSubTileTokens)) {",
        "steps <= 2 * G::kSubTileTokens)) {",
        GAE,
    ),
    Fault(
        "a dropped barrier: the last block's warps hand over their sums",
        "cuda/value_loss.cu",
        "  __syncthreads();\n  if (threadIdx.x != 0) return;\n",
        "  if (threadIdx.x != 0) return;\n",
        LOSS,
    ),
    Fault(
        "a dropped barrier: whether a block is the last",
        "cuda/reduce.cuh",
        "    __threadfence();\n  }\n  __syncthreads();\n",
        "    __threadfence();\n  }\n",
        LOSS,
    ),
    Fault(
        "off by one in a tail: the loss's last token",
        "cuda/value_loss.cu",
        "max(token + kVec - last, I(0))",
        "max(token + kVec - last - 1, I(0))",
        LOSS,
    ),
    Fault(
        "a wrong shuffle mask: sums over a group of lanes",
        "cuda/reduce.cuh",
        "for (int o = lanes / 2; o > 0; o /= 2) x += __shfl_xor_sync(kAllLanes, x, o);",
        "for (int o = lanes / 2; o > 0; o /= 2) x += __shfl_xor_sync(0x0000ffffu, x, o);",
        LOSS,
    ),
    Fault(
        "a 32-bit offset: the loss's vectors",
        "cuda/value_loss.cu",
        "return kColumns ? seq + time * x.time_stride : seq * x.seq_stride + time;",
        "return static_cast<int>(kColumns ? seq + time * x.time_stride : seq * x.seq_stride + time);",
        (*LOSS, "-k", "offsets"),
    ),
    Fault(
        "a launch without the stream: the loss's backward pass",
        "cuda/value_loss.cu",
        "value_loss_backward_kernel<T, true><<<static_cast<unsigned>(blocks), Geometry::kBackwardThreads, 0, stream>>>(p, plan);",
        "value_loss_backward_kernel<T, true><<<static_cast<unsigned>(blocks), Geometry::kBackwardThreads>>>(p, plan);",
        STREAMS,
    ),
    Fault(
        "reading a masked value: the loss's sums",
        "cuda/value_loss.cu",
        "    if (!kAll && (valid & 1u << (8 * i)) == 0) continue;\n",
        "",
        LOSS_EXAMPLES,
    ),
    Fault(
        "a wrong hand-over between blocks: the last warp's partial is left out",
        "cuda/value_loss.cu",
        "i < static_cast<int>(gridDim.x) * warps; i +=",
        "i < static_cast<int>(gridDim.x) * warps - 1; i +=",
        LOSS_EXAMPLES,
    ),
    Fault(
        "a counter that is not reset: the ticket",
        "cuda/value_loss.cu",
        "  if (plan.blocks > 1) cudaMemsetAsync(scratch.ticket, 0, sizeof(*scratch.ticket), stream);\n",
        "",
        LOSS_EXAMPLES,
    ),
    Fault(
        "a rung that returns another's result: long rows' code for rows that share a warp",
        "cuda/value_loss.cu",
        "sizeof(T) == sizeof(float) && plan.lanes == kWarp) {",
        "sizeof(T) == sizeof(float) && plan.lanes >= kWarp / 2) {",
        LOSS,
    ),
    Fault(
        "a bound of another token: the range per token",
        "cuda/value_loss.cu",
        "return value_loss_with_options(v, old, ret, low.v[i], high.v[i], options);",
        "return value_loss_with_options(v, old, ret, low.v[i], high.v[0], options);",
        (*LOSS, "-k", "in_every_kernel"),
    ),
)


def environment(**more):
    """The copy's package before the installed one."""
    path = os.pathsep.join([str(COPY / "python"), str(simulate.SIMULATOR)])
    return {**simulate.environment(), "PYTHONPATH": path, **more}


def simulated(*command, **options):
    """-> the finished process, output as text."""
    run = [sys.executable, "-m", "fakecuda", "run", *command]
    return subprocess.run(run, cwd=COPY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def copy_if_different(source, target):
    """A file that is the same keeps its time stamp, one that is not gets a new one: ninja builds by them."""
    if not Path(target).exists() or Path(source).read_bytes() != Path(target).read_bytes():
        shutil.copyfile(source, target)


def build():
    # The PTX is what runs; the machine code beside it need not be good.
    env = environment(FUSED_CRITIC_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0+PTX", NVCC_APPEND_FLAGS="-Xptxas=-O1")
    done = simulated("--", sys.executable, "setup.py", "build_ext", "--inplace", env=env)
    return done.stdout if done.returncode else None


def test(arguments):
    """-> (passed, what was seen first)."""
    library = next((COPY / "python" / "fused_critic").glob("_C*.so"))
    pytest = [
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-n",
        str(os.cpu_count()),
        "--quick",
        "--devices",
        "cuda",
        "--tb=line",
        *arguments,
    ]
    done = simulated("--devices", "2", "--ext", str(library), "--", *pytest, env=environment())
    failed = re.search(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)
    seen = re.search(r"fakecuda found:\s*(?:E\s+)?([\w-]+)", done.stdout) or re.search(r"ISSUE ([\w-]+)", done.stdout)
    if "passed" not in done.stdout and not failed:
        return False, f"no test ran: {done.stdout[-2000:]}"
    return done.returncode == 0, f"{failed[1] if failed else ''}{f' ({seen[1]})' if seen else ''}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="faults whose name contains one of these words (default: all)")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if not arguments.names or any(word in fault.name for word in arguments.names)]

    COPY.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source, target = ROOT / name, COPY / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_stamp.py")
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignored, copy_function=copy_if_different)
        else:
            copy_if_different(source, target)
    if broken := build():
        raise SystemExit(broken)
    for tests in sorted({fault.tests for fault in chosen}):
        passed, what = test(tests)
        if not passed:
            raise SystemExit(f"without any fault: {what}")

    missed = []
    for fault in chosen:
        path = COPY / "csrc" / fault.file
        original = path.read_text()
        if original.count(fault.old) != 1:
            raise SystemExit(f"{fault.name}: found {original.count(fault.old)} times in {fault.file}: {fault.old}")
        path.write_text(original.replace(fault.old, fault.new))
        try:
            broken = build()
            passed, what = (False, "does not compile") if broken else test(fault.tests)
        finally:
            path.write_text(original)
        if passed or broken:
            missed.append(fault.name)
        print(f"{'MISSED' if passed or broken else 'noticed'}: {fault.name}: {what}", flush=True)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults noticed")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
