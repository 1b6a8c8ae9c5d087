"""Launching kernels of a PTX module."""

import math
import time
from dataclasses import dataclass

import numpy as np

from .arena import Arena
from .compiler import Code
from .counters import Report
from .parser import Source
from .values import F32, MAX_THREADS, TYPES, U8, U64, WARP, PtxError, align
from .wave import Wave


@dataclass
class Options:
    """How a launch is run.

    ``resident``: threads simulated together; ``seed``: shuffle the order in which warps run; ``races``: look for hazards;
    ``stats``: count transactions; ``max_steps``: scheduling steps until a loop counts as endless; ``wave_order``: order of the blocks.
    """

    resident: int = 16384
    seed: int | None = None
    races: bool = True
    stats: bool = True
    max_steps: int = 20_000_000
    wave_order: list[int] | None = None


class Module(Source):
    """A PTX module whose kernels can be launched."""

    def __init__(self, text):
        super().__init__(text)
        self._code = {}  # (kernel, addresses of variables) -> Code

    def code(self, entry, addresses):
        """The kernel's instructions as closures, for module-level variables at ``addresses`` (name -> address)."""
        key = entry.name, tuple(addresses.items())
        if key not in self._code:
            self._code[key] = Code(self, entry, addresses)
        return self._code[key]

    def launch(self, kernel, grid, block, args, shared=0, **options):
        """Run ``kernel`` on numpy arrays.

        ``args``: numpy arrays (device buffers, written back), numpy scalars or Python int/float (converted to the parameter's
        type), bytes, or a list of fields for a struct passed by value (numpy scalars, bytes, and numpy arrays for its pointers;
        natural alignment). The same array object passed twice is one buffer; distinct arrays never overlap. ``options``: Options.
        -> Report. Raises MemoryFault / DeadlockError / DeviceAssert / Unsupported.
        """
        E = self.entry(kernel)
        block3 = dim3(block)
        nthreads = math.prod(block3)
        if not 1 <= nthreads <= MAX_THREADS:
            raise PtxError(f"block of {nthreads} threads")
        if E.maxntid and nthreads > E.maxntid:
            raise PtxError(f"{kernel}: block of {nthreads} threads, .maxntid says {E.maxntid}")
        if len(args) != len(E.param_order):
            raise PtxError(f"{kernel} takes {len(E.param_order)} arguments, {len(args)} given")
        mem = Arena()
        gaddr = {nm: mem.add(buf, nm) for nm, buf in self.globals.items()}
        pbuf = np.zeros(max(E.param_bytes, 1), U8)
        seen = {}

        def device(a, pn):
            if not a.flags.c_contiguous:
                raise PtxError(f"argument for {pn} is not contiguous")
            if id(a) not in seen:
                seen[id(a)] = mem.add(a.reshape(-1).view(U8) if a.size else np.zeros(0, U8), pn)
            return np.array([seen[id(a)]], U64).view(U8)

        for pn, a in zip(E.param_order, args):
            off, ty, size = E.params[pn]
            if isinstance(a, np.ndarray) and a.ndim > 0:
                raw = device(a, pn)
            elif isinstance(a, (bytes, bytearray)):
                raw = np.frombuffer(bytes(a), U8)
            elif isinstance(a, (list, tuple)):  # struct by value: numpy scalars, numpy arrays = pointers
                raw, top = np.zeros(size, U8), 0
                for f in a:
                    if isinstance(f, np.ndarray) and f.ndim > 0:
                        b, al = device(f, pn), 8
                    elif isinstance(f, (bytes, bytearray)):
                        b, al = np.frombuffer(bytes(f), U8), 1
                    else:
                        b = np.frombuffer(np.asarray(f).tobytes(), U8)
                        al = b.size
                    top = align(top, al)
                    raw[top : top + b.size] = b
                    top += b.size
            elif isinstance(a, np.generic) or isinstance(a, np.ndarray):
                raw = np.frombuffer(a.tobytes(), U8)
            elif a is None:
                raw = np.zeros(8, U8)
            else:
                dt = TYPES[ty]
                if isinstance(a, float) and np.dtype(dt).kind != "f" and np.dtype(dt).itemsize != 4:
                    raise PtxError(f"{pn} is .{ty}: pass np.float32/np.float64 explicitly")
                if isinstance(a, float) and np.dtype(dt).kind != "f":
                    dt = F32  # nvcc may declare a float parameter as .b32
                raw = np.frombuffer(np.array(a, dt).tobytes(), U8)
            if raw.size != size:
                raise PtxError(f"argument for {pn} has {raw.size} bytes, parameter has {size}")
            pbuf[off : off + size] = raw
        mem.freeze()
        return self._run(E, dim3(grid), block3, pbuf, mem, gaddr, shared, Report(E, dim3(grid), block3, shared), Options(**options))

    def launch_raw(self, kernel, grid, block, params, mem, gaddr, shared=0, report=None, **options):
        """Run ``kernel`` on memory that already exists: ``params`` are the bytes of the parameter block, ``mem`` is a
        HostArena, ``gaddr`` maps module-level variables to addresses in it. ``report`` (a list) gets the Report first,
        so that it survives a fault."""
        E = self.entry(kernel)
        pbuf = np.zeros(max(E.param_bytes, 1), U8)
        pbuf[: len(params)] = np.frombuffer(bytes(params), U8)
        rep = Report(E, dim3(grid), dim3(block), shared)
        if report is not None:
            report.append(rep)
        return self._run(E, dim3(grid), dim3(block), pbuf, mem, gaddr, shared, rep, Options(**options))

    def _run(self, E, grid, block, pbuf, mem, gaddr, shared, rep, options):
        code = self.code(E, gaddr)
        t0 = time.time()
        nblocks, npad = math.prod(grid), align(math.prod(block), WARP)
        per = max(1, options.resident // npad)
        rng = np.random.default_rng(options.seed) if options.seed is not None else None
        order = np.arange(nblocks) if options.wave_order is None else np.asarray(options.wave_order)
        with np.errstate(all="ignore"):
            for w in range(0, nblocks, per):
                Wave(code, mem, pbuf, order[w : w + per], grid, block, shared, rep, rng, options).run()
        mem.writeback()
        rep.footprint(mem)
        rep.wall_s = time.time() - t0
        return rep


def dim3(d):
    d = tuple(int(x) for x in d) if isinstance(d, (tuple, list)) else (int(d),)
    return d + (1,) * (3 - len(d))
