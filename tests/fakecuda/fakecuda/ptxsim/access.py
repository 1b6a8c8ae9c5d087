"""What the instructions that access memory mean: loads, stores, atomics, cp.async."""

import numpy as np

from .parser import parse_number, split_operands
from .values import TYPES, UINT


class Access:
    """Makers ``op_NAME`` of steps; see Code."""

    def op_ld(self, ins):
        ty = self.ty(ins)
        w = np.dtype(TYPES[ty]).itemsize
        dsts = split_operands(ins.ops[0][1:-1]) if ins.ops[0].startswith("{") else [ins.ops[0]]
        ty2 = {"f16": "b16", "f32": "b32", "f64": "b64", "f16x2": "b32"}.get(ty, ty)
        puts = [self.put(ins, x, ty2) for x in dsts]
        sym, ad = self.addr(ins, ins.ops[1])
        sp = self.space(ins, sym) or "generic"
        nv = len(puts)
        U = UINT[w]
        dt = np.dtype(TYPES[ty2])
        if sp == "param":

            def ldp(S, i):
                a = ad(S, i)
                if a.size > 1 and (a != a[0]).any():
                    raise self.err(ins, "parameter read at an address that differs between threads")
                a = int(a[0])
                for k, p in enumerate(puts):
                    p(S, i, S.pbuf[a + k * w : a + (k + 1) * w].view(U).view(dt))

            return "x", ldp

        def ld(S, i):
            vals = S.load(ins, sp, ad(S, i), i, w, nv)
            for k, p in enumerate(puts):
                p(S, i, vals[k].view(dt))

        return "m", ld

    op_ldu = op_ld

    def op_st(self, ins):
        ty = self.ty(ins)
        w = np.dtype(TYPES[ty]).itemsize
        srcs = split_operands(ins.ops[1][1:-1]) if ins.ops[1].startswith("{") else [ins.ops[1]]
        g = [self.get(ins, x, {"f16": "b16", "bf16": "b16", "f32": "f32", "f64": "f64"}.get(ty, f"b{8 * w}")) for x in srcs]
        sym, ad = self.addr(ins, ins.ops[0])
        sp = self.space(ins, sym) or "generic"
        U = UINT[w]

        def st(S, i):
            S.store(ins, sp, ad(S, i), i, w, [x(S, i).view(U) for x in g])

        return "m", st

    def _atom(self, ins, ret):
        ty = self.ty(ins)
        w = np.dtype(TYPES[ty]).itemsize
        op = next(m for m in ins.mods if m in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"))
        k = 1 if ret else 0
        if ins.ops[k + 1].startswith("{"):
            raise self.err(ins, "vector atomics")
        sym, ad = self.addr(ins, ins.ops[k])
        sp = self.space(ins, sym) or "generic"
        vt = "b16" if ty == "bf16" else ty
        v = self.get(ins, ins.ops[k + 1], vt)
        c = self.get(ins, ins.ops[k + 2], vt) if op == "cas" else None
        d = self.put(ins, ins.ops[0], vt) if ret else None

        def run(S, i):
            old = S.atomic(ins, sp, ad(S, i), i, w, op, ty, v(S, i), c(S, i) if c else None, ret and ins.ops[0] != "_")
            if d is not None and old is not None:
                d(S, i, old)

        return "m", run

    def op_atom(self, ins):
        return self._atom(ins, True)

    def op_red(self, ins):
        return self._atom(ins, False)

    def op_cp(self, ins):
        if ins.mods[:1] != ["async"]:
            raise self.err(ins)
        if "commit_group" in ins.mods or "wait_group" in ins.mods or "wait_all" in ins.mods:
            return "x", lambda S, i: None
        if "bulk" in ins.mods or "mbarrier" in ins.mods:
            raise self.err(ins)
        _, da = self.addr(ins, ins.ops[0])
        _, sa = self.addr(ins, ins.ops[1])
        size = parse_number(ins.ops[2])[1]
        src = self.get(ins, ins.ops[3], "u32") if len(ins.ops) > 3 and not ins.ops[3].startswith("%policy") else None
        w = 4 if size == 4 else 8

        def run(S, i):
            n = size // w
            if src is not None:
                ok = np.broadcast_to(src(S, i) != 0, (S.N if i is None else i.size,))
                a = sa(S, i)
                idx = np.arange(S.N) if i is None else i
                vals = [np.zeros(idx.size, UINT[w]) for _ in range(n)]
                if ok.any():
                    got = S.load(ins, "global", np.broadcast_to(a, idx.shape)[ok], idx[ok], w, n)
                    for k in range(n):
                        vals[k][ok] = got[k]
            else:
                vals = S.load(ins, "global", sa(S, i), i, w, n)
            S.store(ins, "shared", da(S, i), i, w, vals)

        return "m", run
