"""Runs the kernels that the shim (libcudart.so.13) hands over, in ptxsim, and keeps the record.

Imported by the shim on the first kernel launch of a process, or by ``import fakecuda``.
"""

import atexit
import ctypes as C
import json
import os
import sys
import traceback

import numpy as np

from . import ptxsim
from .fatbin import ELF, PTX, Fatbin

ERR = {
    "InvalidValue": 1,
    "Config": 9,
    "NoImage": 209,
    "Illegal": 700,
    "Assert": 710,
    "Resources": 701,
    "Misaligned": 716,
    "Failure": 719,
    "NotSupported": 801,
}
lib = C.CDLL(None)


class Func(C.Structure):
    _fields_ = [("name", C.c_char_p), ("host", C.c_void_p), ("fatbin", C.c_void_p), ("lib", C.c_char_p)]


class Launch(C.Structure):
    _fields_ = [
        ("f", C.POINTER(Func)),
        ("g", C.c_uint * 3),
        ("b", C.c_uint * 3),
        ("smem", C.c_size_t),
        ("stream", C.c_void_p),
        ("device", C.c_int),
        ("coop", C.c_int),
        ("args", C.POINTER(C.c_void_p)),
    ]


class Attr(C.Structure):
    _fields_ = [
        ("shared", C.c_uint64),
        ("local", C.c_uint64),
        ("konst", C.c_uint64),
        ("max_threads", C.c_int),
        ("regs", C.c_int),
        ("ptx", C.c_int),
        ("bin", C.c_int),
    ]


if not hasattr(lib, "fc_hooks"):
    raise ImportError("fakecuda: the shim is not loaded; start the program with `python -m fakecuda run -- ...`")
for _n in ("fc_dev_base", "fc_shift", "fc_allocs", "fc_text", "fc_peak", "fc_funcs", "fc_op"):
    getattr(lib, _n).restype = C.c_uint64
BASE, SHIFT = lib.fc_dev_base(), lib.fc_shift()
_card = (C.c_int * 7)()
lib.fc_card(_card)
MAJOR, MINOR, SMS, THREADS_SM, BLOCKS_SM, SMEM_SM, SMEM_OPTIN = _card
CC = MAJOR * 10 + MINOR
MAX_THREADS, MAX_BLOCK_Z, MAX_GRID = ptxsim.MAX_THREADS, (64,), (2**31 - 1, 65535, 65535)
SM_REGISTERS, REGISTER_GRAIN = 65536, 256  # registers of an SM; a warp takes a multiple of the grain
SMEM_DEFAULT = 48 << 10  # bytes of shared memory that a block may have without opting in to more
POOL = 64 << 30  # bytes of address space for device memory
ALLOC = np.dtype([("addr", "u8"), ("size", "u8"), ("id", "u8"), ("device", "i4"), ("live", "i4")])

LAUNCHES = []  # one dict per launch, in order
ISSUES = []  # one dict per problem: kind, text, kernel, test
COVER = {}  # kernel symbol -> (warp executions per instruction, ptxsim's Entry)
NAMES = {}  # allocation id -> name given by the user
CONTEXT = [None]  # what is running (pytest's node id)
OPTIONS = {
    "seed": int(os.environ["FAKECUDA_SEED"]) if os.environ.get("FAKECUDA_SEED") else None,
    "max_steps": int(os.environ.get("FAKECUDA_MAX_STEPS", "2000000")),
    "resident": int(os.environ.get("FAKECUDA_RESIDENT", "16384")),
    "stats": os.environ.get("FAKECUDA_STATS", "1") != "0",
}
_EXT = [os.path.realpath(p) for p in os.environ.get("FAKECUDA_EXT", "").split(os.pathsep) if p]
_fatbins, _modules, _globals, _seen_lib = {}, {}, {}, {}


def demangle(name):
    try:
        f = C.CDLL("libstdc++.so.6").__cxa_demangle
        f.restype = C.c_void_p
        p = f(name.encode(), None, None, None)
        return C.string_at(p).decode() if p else name
    except OSError:
        return name


def allocations():
    """Table of the shim's allocations, sorted by address (freed ones that are still quarantined have live == 0)."""
    n = lib.fc_allocs(None, C.c_uint64(0))
    t = np.zeros(n + 64, ALLOC)
    n = lib.fc_allocs(C.c_void_p(t.ctypes.data), C.c_uint64(t.size))
    return t[:n]


def issue(kind, text, kernel=None):
    ISSUES.append({"kind": kind, "text": text, "kernel": kernel, "test": CONTEXT[0]})


def take_host_issues():
    """Move what the shim noticed (bad memcpy, wrong stream...) into ISSUES."""
    b = C.create_string_buffer(1 << 20)
    lib.fc_text(0, b, C.c_uint64(len(b)))
    for ln in b.value.decode().splitlines():
        kind, bar, text = ln.partition("|")
        issue(kind, text) if bar else issue("host", ln)


def table(what):
    b = C.create_string_buffer(1 << 20)
    lib.fc_text({"calls": 1, "bytes": 2}[what], b, C.c_uint64(len(b)))
    return {k: int(v) for k, v in (ln.split("\t") for ln in b.value.decode().splitlines())}


class Pool(ptxsim.HostArena):
    """ptxsim's view of the device memory of one device; the bounds are the exact sizes that were asked for."""

    def __init__(self, device, params):
        self.table, self.device, self.params = allocations(), device, params
        end = int((self.table["addr"] + self.table["size"]).max()) if self.table.size else BASE
        span = (end - BASE + 1023) // 512 * 512
        super().__init__(BASE, np.frombuffer((C.c_ubyte * span).from_address(BASE + SHIFT), np.uint8), [])
        t = self.table[(self.table["live"] == 1) & (self.table["device"] == device)]
        if t.size:
            self.starts = (t["addr"] - np.uint64(BASE)).astype(np.int64)
            self.ends = self.starts + t["size"].astype(np.int64)

    def near(self, off):
        """Which buffer an address is in, shortly after or before."""
        a, after, before = BASE + off, 4096, 512
        t = self.table
        k = int(np.searchsorted(t["addr"], np.uint64(max(a, 0)), side="right")) - 1 if t.size else -1
        if not BASE <= a < BASE + POOL:
            return f"{a:#x}: null, host or wild pointer"
        if k < 0 or a >= int(t["addr"][k]) + int(t["size"][k]) + after:
            if k + 1 >= t.size or int(t["addr"][k + 1]) - a > before:
                return f"{a:#x}: no buffer"
            k += 1  # shortly before a buffer
        at, n, i = int(t["addr"][k]), int(t["size"][k]), int(t["id"][k])
        who = [f"param {p}+{o}" for p, o, v in self.params if at <= v < at + max(n, 1)]
        nm = NAMES.get(i)
        why = "" if t["live"][k] else ", already freed"
        if t["device"][k] != self.device:
            why += f", of device {t['device'][k]} while the kernel runs on device {self.device}"
        return f"byte {a - at} of buffer {nm or '#%d' % i} ({n} bytes{why}{'; ' + ', '.join(who) if who else ''})"


def op(stream, device):
    """A new operation on a stream -> id for access()."""
    return lib.fc_op(C.c_void_p(stream), device)


def access(addr, opid, write, what):
    """The operation reads or writes the allocation at addr: must be ordered after earlier accesses on other streams."""
    lib.fc_access(C.c_uint64(addr), C.c_uint64(opid), int(write), what.encode())


def fatbin(addr):
    if addr not in _fatbins:
        _fatbins[addr] = Fatbin(addr)
    return _fatbins[addr]


def module(addr):
    """ptxsim module of a fat binary, or None if it has no PTX for this card."""
    if addr not in _modules:
        text = fatbin(addr).ptx(CC)
        _modules[addr] = ptxsim.Module(text) if text else None
    return _modules[addr]


def under_test(path):
    if path not in _seen_lib:
        p = os.path.realpath(path)
        _seen_lib[path] = p in _EXT if _EXT else not any(s in p for s in ("/torch/lib/", "/nvidia/", "/torch_lib/"))
    return _seen_lib[path]


def device_globals(addr, device):
    """Addresses of the module's __device__/__constant__ variables on a device, allocated and initialised on first use."""
    key = addr, device
    if key not in _globals:
        out = {}
        for nm, init in module(addr).globals.items():
            p = C.c_void_p()
            if lib.fc_alloc_on(device, C.c_size_t(init.size), C.byref(p)):
                raise MemoryError(nm)
            C.memmove(p.value + SHIFT, init.ctypes.data, init.size)
            out[nm] = p.value
            t = allocations()
            NAMES[int(t["id"][t["addr"] == p.value][0])] = f"variable {demangle(nm)}"
        _globals[key] = out
    return _globals[key]


def attributes(f):
    """-> (entry or None, registers, error)."""
    name = f.name.decode()
    fb = fatbin(f.fatbin)
    regs = fb.registers(CC).get(name, 0)
    m = module(f.fatbin)
    if m is None or name not in m.names:
        has = any(a // 10 == MAJOR and a <= CC for a in fb.archs(ELF))
        return None, regs, "NotSupported" if has else "NoImage"
    try:
        return m.entry(name), regs, None
    except ptxsim.Unsupported as e:
        return None, regs, str(e)


def warp_registers(regs):
    """Registers that a warp takes of an SM, at ``regs`` per thread."""
    return -(-regs * ptxsim.WARP // REGISTER_GRAIN) * REGISTER_GRAIN


def _launch(L):
    f = L.f.contents
    name, path = f.name.decode(), f.lib.decode()
    shown = demangle(name)
    grid, block = tuple(L.g), tuple(L.b)
    row = {
        "kernel": shown,
        "symbol": name,
        "lib": os.path.basename(path),
        "grid": grid,
        "block": block,
        "shared": L.smem,
        "stream": L.stream or 0,
        "device": L.device,
        "test": CONTEXT[0],
        "status": "ok",
    }
    LAUNCHES.append(row)

    def fail(err, kind, text):
        row["status"] = kind
        issue(kind, f"{shown} <<<{grid}, {block}, {L.smem}>>>: {text}", shown)
        return ERR[err]

    if not under_test(path):
        return fail(
            "NotSupported",
            "foreign-kernel",
            f"kernel of {os.path.basename(path)}; fakecuda runs only the kernels of the extension under test",
        )
    t = sys.modules.get("torch")
    if t is not None and hasattr(t, "cuda") and t.cuda.is_initialized():
        want = t.cuda.current_stream(L.device).cuda_stream
        if want != (L.stream or 0):
            issue(
                "stream",
                f"{shown}: launched on stream {L.stream or 0:#x}, PyTorch's current stream of device {L.device} is {want:#x}",
                shown,
            )
    E, regs, err = attributes(f)
    if err == "NoImage":
        return fail(
            err,
            "no-image",
            f"no PTX <= compute_{CC} and no SASS for sm_{CC} (has PTX {fatbin(f.fatbin).archs(PTX)}, SASS {fatbin(f.fatbin).archs(ELF)})",
        )
    if err and err not in ERR:
        return fail("NotSupported", "unsupported", err)
    if err:
        return fail(err, "no-ptx", f'SASS but no PTX for sm_{CC}: build with TORCH_CUDA_ARCH_LIST="...+PTX"')
    row["registers"], row["static_shared"] = regs, E.shared_bytes
    n = block[0] * block[1] * block[2]
    # what the driver checks
    if 0 in grid or 0 in block or n > MAX_THREADS or any(x > most for x, most in zip(grid + block[2:], MAX_GRID + MAX_BLOCK_Z)):
        return fail("Config", "launch-config", "invalid configuration")
    if E.maxntid and n > E.maxntid:
        return fail("InvalidValue", "launch-config", f"{n} threads, __launch_bounds__ says {E.maxntid}")
    if regs and warp_registers(regs) * ((n + ptxsim.WARP - 1) // ptxsim.WARP) > SM_REGISTERS:
        return fail("Resources", "launch-config", f"{regs} registers x {n} threads do not fit an SM")
    limit = max(lib.fc_dyn_smem(L.f, L.device), SMEM_DEFAULT - E.shared_bytes)
    if L.smem > limit or L.smem + E.shared_bytes > SMEM_OPTIN:
        return fail(
            "InvalidValue",
            "launch-config",
            f"{L.smem} bytes of dynamic shared memory, limit {limit} (cudaFuncAttributeMaxDynamicSharedMemorySize)",
        )
    if L.coop:
        return fail("NotSupported", "unsupported", "cooperative launch")
    pbuf, words = bytearray(E.param_bytes), []
    for k, pn in enumerate(E.param_order):
        off, _, size = E.params[pn]
        pbuf[off : off + size] = raw = C.string_at(L.args[k], size)
        words += [(k, o, int.from_bytes(raw[o : o + 8], "little")) for o in range(0, size - 7, 8)]
    got = []
    gaddr = device_globals(f.fatbin, L.device)
    pool = Pool(L.device, words)
    try:
        module(f.fatbin).launch_raw(name, grid, block, pbuf, pool, gaddr, shared=L.smem, report=got, **OPTIONS)
        return 0
    except ptxsim.MemoryFault as e:
        mis = str(e).startswith("misaligned")
        return fail("Misaligned" if mis else "Illegal", "misaligned" if mis else "out-of-bounds", str(e))
    except ptxsim.DeadlockError as e:
        return fail("Failure", "deadlock", str(e))
    except ptxsim.DeviceAssert as e:
        return fail("Assert", "assert", str(e))
    except ptxsim.PtxError as e:
        return fail("NotSupported", "unsupported", str(e))
    finally:
        if got:
            row.update(got[0].as_dict())
            _cover(name, E, got[0])
            opid = op(L.stream, L.device)
            for write, sectors in ((False, pool.rd), (True, pool.wr)):
                for k in np.unique(np.searchsorted(pool.starts, sectors.all() * ptxsim.SECTOR, side="right") - 1):
                    access(BASE + int(pool.starts[max(k, 0)]), opid, write, shown.split("(")[0])
            for kind, line, text, cnt in got[0].issues:
                issue(kind, f"x{cnt}: {text}", shown)


def _cover(name, E, rep):
    if name not in COVER:
        COVER[name] = np.zeros(len(E.insts), np.int64), E
    COVER[name][0][:] += (rep.issued - rep.skipped)[: len(E.insts)]


def functions():
    """The kernels of the extension under test, as the shim knows them."""
    a = (C.POINTER(Func) * lib.fc_funcs(None, C.c_uint64(0)))()
    lib.fc_funcs(a, C.c_uint64(len(a)))
    return [f.contents for f in a if under_test(f.contents.lib.decode())]


def images():
    """{kernel: registers, static shared memory, launch bounds; None where neither PTX nor cubin tells}."""
    out = {}
    for f in functions():
        name, m = f.name.decode(), module(f.fatbin)
        limits = m.limits(name) if m is not None and name in m.names else {}
        out[demangle(name)] = {
            "library": os.path.basename(f.lib.decode()),
            "registers": fatbin(f.fatbin).registers(CC).get(name),
            **{k: limits.get(k) for k in ("static_shared", "max_threads", "min_blocks_per_sm")},
        }
    return out


def lines():
    """{source line: warp instructions executed}, for every line that a kernel of the extension has code for."""
    out = {}
    for addr in {f.fatbin for f in functions()}:
        m = module(addr)
        if m is not None:
            out.update(dict.fromkeys(m.code_lines(), 0))
    for n, E in COVER.values():
        for k, ins in zip(n.tolist(), E.insts):
            if ins.loc:
                out[ins.loc] = out.get(ins.loc, 0) + k
    return out


def _guard(fn, bad):
    def call(*a):
        try:
            return fn(*a)
        except BaseException:
            traceback.print_exc()
            issue("internal", traceback.format_exc())
            return bad

    return call


def _attr(f, out):
    E, regs, err = attributes(f.contents)
    if err:
        return ERR.get(err, ERR["NotSupported"])
    o = out.contents
    o.shared, o.local, o.konst, o.regs = E.shared_bytes, E.local_bytes, 0, regs
    fit = SM_REGISTERS // warp_registers(regs) * ptxsim.WARP if regs else MAX_THREADS
    o.max_threads, o.ptx, o.bin = min(E.maxntid or MAX_THREADS, fit), fatbin(f.contents.fatbin).best(CC), CC
    return 0


def _symbol(fb, name, device):
    return device_globals(fb, device).get(name.decode(), 0)


_cb = (
    C.CFUNCTYPE(C.c_int, C.POINTER(Launch))(_guard(lambda p: _launch(p.contents), ERR["Failure"])),
    C.CFUNCTYPE(C.c_int, C.POINTER(Func), C.POINTER(Attr))(_guard(_attr, ERR["Failure"])),
    C.CFUNCTYPE(C.c_uint64, C.c_void_p, C.c_char_p, C.c_int)(_guard(_symbol, 0)),
)
lib.fc_hooks(*[C.cast(c, C.c_void_p) for c in _cb])


# ---------------------------------------------------------------- report


def record():
    """What this process did, as one report (see report.py)."""
    take_host_issues()
    return {
        "card": CC,
        "launches": LAUNCHES,
        "issues": ISSUES,
        "calls": table("calls"),
        "bytes": table("bytes"),
        "peak_bytes": max(int(lib.fc_peak(d)) for d in range(max(lib.fc_devices(), 1))),
        "images": images(),
        "lines": lines(),
    }


def write_record():
    """Leave the record where `fakecuda run` finds it, or print the issues where there is no such run."""
    folder = os.environ.get("FAKECUDA_REPORT_DIR")
    if folder:
        # In one step: a test worker that is killed while it writes a second time leaves what it wrote the first time.
        path = os.path.join(folder, f"{os.getpid()}.json")
        with open(path + ".part", "w") as f:
            json.dump(record(), f)
        os.replace(path + ".part", path)
    elif ISSUES:
        print("fakecuda:", *[f"{i['kind']}: {i['text']}" for i in ISSUES], sep="\n  ", file=sys.stderr)


atexit.register(write_record)
