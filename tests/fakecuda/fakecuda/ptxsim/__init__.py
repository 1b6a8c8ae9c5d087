"""Runs PTX kernels (the text that ``nvcc -ptx`` writes) on the CPU with numpy.

    mod = ptxsim.Module.from_file("kernels.ptx")            # or ptxsim.Module(text)
    x = np.random.rand(1 << 20).astype("f4"); out = np.zeros(1, "f4")
    report = mod.launch("reduce_sum", grid=256, block=256, args=[x, out, np.int32(x.size)], shared=0)
    print(out, report)                                       # arrays are device buffers, updated in place

* Every thread of a *wave* of blocks is executed together (``resident`` threads) as numpy vectors. Each thread has its own program
  counter; the lowest one of every warp runs first, so warps reconverge as on hardware, and other warps get a turn regularly, so
  blocks that wait for one another (decoupled look-back, "last block" tickets, spin locks across warps) make progress. ``seed``
  shuffles the choice of which warps run next, which is a cheap test for order dependence.
* shfl.sync / vote.sync / match.sync / redux.sync / bar.warp.sync wait for every lane of their member mask; bar.sync and barrier.*
  wait for the block. A block that can never go on is a DeadlockError.
* Every global, shared, local and param access is checked for bounds and alignment (MemoryFault names kernel, PTX line, source line
  with -lineinfo, block, thread, address).
* ``report.issues``: hazards on shared memory (write/write, read/write without a barrier in between; within a warp without
  __syncwarp: 'race-intra-warp'), reads of shared bytes nobody wrote, shuffles that read a lane which does not take part,
  ld.global.nc of data the launch itself writes, plain writes of different values to one global address by different blocks or by
  several threads in one instruction.
* Counts: warp and thread instructions, SIMD efficiency, opcode mix, global requests / 32-byte sectors / bytes, distinct sectors,
  shared-memory bank-conflict replays, barriers, atomics - in total and per instruction (``report.hot()``).

It is a functional model with transaction counts: no time, no caches, no mma/wgmma/TMA/mbarrier, no textures, no device-side calls
(nvcc -O3 inlines; ``call`` raises Unsupported). ex2/lg2/sin/cos/tanh/rcp/rsqrt .approx are evaluated exactly and then rounded, so
they differ from hardware in the last bits. Memory is sequentially consistent: a missing __threadfence cannot be seen.

bf16 has no numpy type: pass uint16 arrays, see f32_to_bf16 / bf16_to_f32.
"""

from .arena import SECTOR, HostArena
from .counters import Report
from .module import Module, Options
from .rounding import bf16_to_f32, f32_to_bf16
from .values import MAX_THREADS, WARP, DeadlockError, DeviceAssert, MemoryFault, PtxError, Unsupported

__all__ = [
    "DeadlockError",
    "DeviceAssert",
    "HostArena",
    "MAX_THREADS",
    "MemoryFault",
    "Module",
    "Options",
    "PtxError",
    "Report",
    "SECTOR",
    "Unsupported",
    "WARP",
    "bf16_to_f32",
    "f32_to_bf16",
]
