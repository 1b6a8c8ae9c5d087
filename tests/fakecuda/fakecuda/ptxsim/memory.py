"""Loads, stores and atomics of a wave, checked for bounds and alignment."""

import numpy as np

from .rounding import half_add
from .values import LOCAL_BASE, SHARED_BASE, TYPES, U16, UINT, WINDOW, MemoryFault


class Memory:
    """How a Wave accesses memory. ``sp`` is the state space ("generic": found from the address), ``w`` the bytes of one element;
    a fault is raised before anything is written."""

    def _gather(self, sp, addr, i, w, nv, ins):
        """-> (view of uint w, element index array) after bounds and alignment checks."""
        n = self.N if i is None else i.size
        if addr.size != n:
            addr = np.full(n, addr[0])
        tot = w * nv
        if tot > 1 and np.count_nonzero(addr & (tot - 1)):
            k = int(np.argmax((addr & (tot - 1)) != 0))
            raise MemoryFault(f"misaligned {tot}-byte {sp} access at {int(addr[k]):#x}: {self.where(ins, k if i is None else int(i[k]))}")
        if sp == "global":
            off = addr - self.mem.base
            k = self.mem.bad(off, tot)
            if k >= 0:
                raise MemoryFault(
                    f"out-of-bounds {tot}-byte global access at {self.mem.near(int(off[k]))}: "
                    f"{self.where(ins, k if i is None else int(i[k]))}"
                )
            return self.mem.views[w], off // w, off
        lim = self.smem_bytes if sp == "shared" else self.E.local_bytes
        if addr.min() < 0 or addr.max() + tot > lim:
            bad = (addr < 0) | (addr + tot > lim)
            k = int(np.argmax(bad))
            raise MemoryFault(
                f"out-of-bounds {tot}-byte {sp} access at {int(addr[k])} of {lim} bytes: {self.where(ins, k if i is None else int(i[k]))}"
            )
        if sp == "shared":
            off = addr + (self.blk if i is None else self.blk[i]) * self.sstride
            return self.sviews[w], off // w, addr
        off = addr + (self.all if i is None else i) * self.lstride
        return self.lviews[w], off // w, addr

    def _generic(self, ins, addr, i):
        """Split a generic access by window: yields (space, addr, idx, position)."""
        n = self.N if i is None else i.size
        addr = np.broadcast_to(addr, (n,))
        idx = self.all if i is None else i
        sh = (addr >= SHARED_BASE) & (addr < SHARED_BASE + WINDOW)
        lo = (addr >= LOCAL_BASE) & (addr < LOCAL_BASE + WINDOW)
        for sp, m, base in (("shared", sh, SHARED_BASE), ("local", lo, LOCAL_BASE), ("global", ~(sh | lo), 0)):
            if m.any():
                pos = np.flatnonzero(m)
                yield sp, addr[pos] - base, idx[pos], pos

    def load(self, ins, sp, addr, i, w, nv):
        if sp == "generic":
            parts = list(self._generic(ins, addr, i))
            if len(parts) == 1:
                return self.load(ins, parts[0][0], parts[0][1], i, w, nv)
            n = self.N if i is None else i.size
            out = [np.zeros(n, UINT[w]) for _ in range(nv)]
            for s, a, ix, pos in parts:
                for k, v in enumerate(self.load(ins, s, a, ix, w, nv)):
                    out[k][pos] = v
            return out
        view, e, off = self._gather(sp, addr, i, w, nv, ins)
        if self.stats:
            self._count(ins, sp, off, i, w * nv, False)
        if sp == "shared" and self.races:
            self._race(ins, e * w, i, w * nv, False, None)
        if sp == "global" and self.races and "nc" in ins.mods:
            self._global_nc(ins, off, i, w * nv)
        return [view[e + k] for k in range(nv)] if nv > 1 else [view[e]]

    def store(self, ins, sp, addr, i, w, vals):
        if sp == "generic":
            parts = list(self._generic(ins, addr, i))
            n = self.N if i is None else i.size
            for s, a, ix, pos in parts:
                self.store(
                    ins, s, a, i if len(parts) == 1 else ix, w, vals if len(parts) == 1 else [np.broadcast_to(v, (n,))[pos] for v in vals]
                )
            return
        view, e, off = self._gather(sp, addr, i, w, len(vals), ins)
        if self.stats:
            self._count(ins, sp, off, i, w * len(vals), True)
        if sp == "shared" and self.races:
            self._race(ins, e * w, i, w * len(vals), True, vals[0] if len(vals) == 1 else None)
        old = [view[e + k] for k in range(len(vals))] if sp == "global" and self.races else None
        for k, v in enumerate(vals):
            view[e + k if k else e] = v
        if old is not None:
            self._global_write(ins, off, i, w, vals, old, view, e)

    def atomic(self, ins, sp, addr, i, w, op, ty, val, cmp, ret):
        n = self.N if i is None else i.size
        if sp == "generic":
            parts = list(self._generic(ins, addr, i))
            out = None
            for s, a, ix, pos in parts:
                vv = np.broadcast_to(val, (n,))[pos]
                cc = np.broadcast_to(cmp, (n,))[pos] if cmp is not None else None
                o = self.atomic(ins, s, a, ix, w, op, ty, vv, cc, ret)
                if o is not None:
                    out = np.zeros(n, o.dtype) if out is None else out
                    out[pos] = o
            return out
        view, e, off = self._gather(sp, addr, i, w, 1, ins)
        if self.stats:
            self._count(ins, sp, off, i, w, True, True)
        if sp == "shared" and self.races:
            self._race(ins, e * w, i, w, True, None, True)
        val = np.broadcast_to(val, (n,))
        half = ty in ("f16", "bf16", "f16x2", "bf16x2")
        if not ret and not half and op in ("add", "min", "max", "and", "or", "xor"):
            dt = np.dtype(TYPES[ty])
            u = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[op]
            if self.rng is not None:
                p = self.rng.permutation(n)
                u.at(view.view(dt), e[p], val[p].view(dt))
            else:
                u.at(view.view(dt), e, val.view(dt))
            return None
        dt = np.dtype(U16 if ty == "bf16" else TYPES[ty])
        tv = view.view(dt)
        old = np.empty(n, dt)
        order = self.rng.permutation(n) if self.rng is not None else range(n)
        for k in order:
            a, v = e[k], val[k]
            o = tv[a]
            old[k] = o
            if op == "add":
                if half:
                    tv[a] = half_add(ty, o, v)
                else:
                    tv[a] = o + v
            elif op == "exch":
                tv[a] = v
            elif op == "cas":
                c = cmp[k] if cmp.size > 1 else cmp[0]
                if o == v:
                    tv[a] = c
            elif op == "inc":
                tv[a] = 0 if o >= v else o + 1
            elif op == "dec":
                tv[a] = v if o == 0 or o > v else o - 1
            elif op in ("min", "max"):
                tv[a] = min(o, v) if op == "min" else max(o, v)
            else:
                tv[a] = {"and": o & v, "or": o | v, "xor": o ^ v}[op]
        return old
