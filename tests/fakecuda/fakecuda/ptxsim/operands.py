"""Operands of instructions: reading and writing registers, constants, special registers, addresses."""

import re

import numpy as np

from .parser import NUMBER, parse_number
from .rounding import bf16_to_f32, f32_to_bf16, flush
from .values import F16, F32, F64, SINT, TYPES, U16, U32, U64, UINT, WARP, Unsupported


class Operands:
    """What the makers of instructions build on. The functions that are returned take the wave ``S`` and the indices ``i`` of the
    threads, or None for all of them."""

    def reg(self, t):
        return self.E.regs.get(t)

    def get(self, ins, t, ty):
        """-> f(S, idx) giving the operand as an array of TYPES[ty] (length 1 for constants)."""
        dt = np.dtype(TYPES[ty])
        t = t.strip()
        neg = False
        if t.startswith("!"):
            neg, t = True, t[1:]
        if t.startswith("-") and t[1:] in self.E.regs:
            inner = self.get(ins, t[1:], ty)
            return lambda S, i: -inner(S, i)
        r = self.reg(t)
        if r is not None:
            k, rdt = r
            if ty == "pred" or rdt is np.bool_:
                if neg:
                    return lambda S, i: ~S.R[k] if i is None else ~S.R[k][i]
                return lambda S, i: S.R[k] if i is None else S.R[k][i]
            w = np.dtype(rdt).itemsize
            if w == dt.itemsize:
                return lambda S, i: S.R[k].view(dt) if i is None else S.R[k][i].view(dt)
            u = UINT[dt.itemsize]
            return lambda S, i: (S.R[k] if i is None else S.R[k][i]).astype(u).view(dt)
        if NUMBER.match(t):
            c = self.const(t, ty)
            return lambda S, i: c
        if t.startswith("%"):
            return self.special(ins, t, dt)
        a = self.symaddr(t)
        if a is not None:
            c = np.array([a & ((1 << 8 * dt.itemsize) - 1)], UINT[dt.itemsize]).view(dt)
            return lambda S, i: c
        m = re.match(r"([\w$]+)\s*\+\s*(-?\w+)$", t)
        if m and self.symaddr(m.group(1)) is not None:
            a = self.symaddr(m.group(1)) + int(m.group(2), 0)
            c = np.array([a & ((1 << 8 * dt.itemsize) - 1)], UINT[dt.itemsize]).view(dt)
            return lambda S, i: c
        raise self.err(ins, f"operand {t!r}")

    def const(self, t, ty):
        dt = np.dtype(TYPES[ty])
        k, v = parse_number(t)
        if ty == "pred":
            return np.array([bool(v)])
        if k == "i" and dt.kind != "f":
            return np.array([v & ((1 << 8 * dt.itemsize) - 1)], UINT[dt.itemsize]).view(dt)
        if k == "i":
            return np.array([v], dt)
        src = np.array([v], U32).view(F32) if k == "f" else np.array([v], U64).view(F64)
        if dt.kind == "f":
            return src.astype(dt)
        if src.dtype.itemsize == dt.itemsize:
            return src.view(dt)
        if k == "d" and dt.itemsize == 4:
            return src.astype(F32).view(dt)
        raise Unsupported(f"constant {t} as .{ty}")

    def symaddr(self, t):
        """The address of a variable or parameter, None if the name is neither."""
        E = self.E
        if t in E.shared:
            return E.shared[t]
        if t in self.mod.extern_shared:
            return self.dyn_base
        if t in E.local:
            return E.local[t]
        if t in self.gaddr:
            return self.gaddr[t]
        if t in E.params:  # address within the parameter block, for ld.param [reg+imm]
            return E.params[t][0]
        return None

    def symspace(self, t):
        E = self.E
        if t in E.shared or t in self.mod.extern_shared:
            return "shared"
        if t in E.local:
            return "local"
        if t in self.gaddr:
            return "global"
        if t in E.params:
            return "param"
        return None

    _XYZ = {"x": 0, "y": 1, "z": 2}

    def special(self, ins, t, dt):
        base, _, c = t.partition(".")
        names = {"%tid": "tid", "%ntid": "ntid", "%ctaid": "ctaid", "%nctaid": "nctaid"}
        u = UINT[dt.itemsize]
        if base in names:
            n, k = names[base], self._XYZ[c]
            return lambda S, i: (S.SP[n][k] if i is None or S.SP[n][k].size == 1 else S.SP[n][k][i]).astype(u).view(dt)
        lane = {
            "%laneid": lambda n: n,
            "%lanemask_eq": lambda n: 1 << n,
            "%lanemask_lt": lambda n: (1 << n) - 1,
            "%lanemask_le": lambda n: (2 << n) - 1,
            "%lanemask_gt": lambda n: ~((2 << n) - 1) & 0xFFFFFFFF,
            "%lanemask_ge": lambda n: ~((1 << n) - 1) & 0xFFFFFFFF,
        }
        if base in lane:
            tab = np.array([lane[base](n) for n in range(WARP)], U64).astype(u)
            return lambda S, i: tab[S.lane if i is None else S.lane[i]].view(dt)
        if base == "%warpid":
            return lambda S, i: (S.warp_in_block if i is None else S.warp_in_block[i]).astype(u).view(dt)
        if base == "%smid":
            return lambda S, i: ((S.blk if i is None else S.blk[i]) % 108).astype(u).view(dt)
        const = {"%nwarpid": 64, "%nsmid": 108, "%gridid": 1, "WARP_SZ": 32}
        if base in const:
            v = np.array([const[base]], u).view(dt)
            return lambda S, i: v
        if base in ("%dynamic_smem_size", "%total_smem_size"):
            return lambda S, i: np.array([S.dyn if "dyn" in base else S.smem_bytes], u).view(dt)
        if base in ("%clock", "%clock64", "%globaltimer", "%clock_hi", "%globaltimer_lo", "%globaltimer_hi"):
            return lambda S, i: np.array([S.steps * 32], U64).astype(u).view(dt)
        raise self.err(ins, f"special register {t}")

    def put(self, ins, t, ty):
        """-> f(S, idx, value) writing TYPES[ty] values, sign/zero-extending into a wider register."""
        if t in ("_", ""):
            return lambda S, i, v: None
        r = self.reg(t)
        if r is None:
            raise self.err(ins, f"destination {t!r}")
        k, rdt = r
        if rdt is np.bool_:

            def wp(S, i, v):
                if i is None:
                    S.R[k][:] = v
                else:
                    S.R[k][i] = v

            return wp
        dt = np.dtype(TYPES[ty])
        w = np.dtype(rdt).itemsize
        if w == dt.itemsize:

            def w0(S, i, v):
                if v.dtype != dt:
                    v = v.astype(dt)
                if i is None:
                    S.R[k][:] = v.view(rdt)
                else:
                    S.R[k][i] = v.view(rdt)

            return w0
        if w > dt.itemsize:
            wide = SINT[w] if dt.kind == "i" else UINT[w]

            def w1(S, i, v):
                v = v.astype(dt, copy=False)
                v = (v.view(UINT[dt.itemsize]) if dt.kind == "f" else v).astype(wide).view(rdt)
                if i is None:
                    S.R[k][:] = v
                else:
                    S.R[k][i] = v

            return w1

        def w2(S, i, v):
            v = v.astype(dt, copy=False).view(UINT[dt.itemsize]).astype(rdt)
            if i is None:
                S.R[k][:] = v
            else:
                S.R[k][i] = v

        return w2

    def ty(self, ins, nth=-1):
        """One of the types among the modifiers, the last unless said otherwise."""
        ts = [m for m in ins.mods if m in TYPES]
        if not ts:
            raise self.err(ins, "no type")
        return ts[nth]

    @staticmethod
    def rnd(ins):
        """The rounding mode of floating-point arithmetic."""
        for m in ins.mods:
            if m in ("rn", "rz", "rm", "rp"):
                return m
        return "rn"

    def simple(self, ins, f, ty=None, dty=None):
        """The instruction that applies ``f`` to all operands, read as ``ty``, and writes the result as ``dty``."""
        ty = ty or self.ty(ins)
        dty = dty or ty
        src = [self.get(ins, o, ty) for o in ins.ops[1:]]
        d = self.put(ins, ins.ops[0], dty)
        ftz = "ftz" in ins.mods and ty == "f32"
        sat = "sat" in ins.mods and TYPES[ty] in (F32, F64, F16)

        if not ftz and not sat and len(src) == 1:
            (a,) = src
            return "x", lambda S, i: d(S, i, f(a(S, i)))
        if not ftz and not sat and len(src) == 2:
            a, b = src
            return "x", lambda S, i: d(S, i, f(a(S, i), b(S, i)))

        def run(S, i):
            a = [s(S, i) for s in src]
            if ftz:
                a = [flush(x) for x in a]
            v = f(*a)
            if ftz and v.dtype == F32:
                v = flush(v)
            if sat:
                v = np.where(np.isnan(v), v.dtype.type(0), np.clip(v, 0, 1))
            d(S, i, v)

        return "x", run

    def halfs(self, ins, f, ty):
        """The same in half precision: unpacks to float32, applies ``f``, rounds and packs."""
        src = [self.get(ins, o, "b32" if ty.endswith("x2") else "b16") for o in ins.ops[1:]]
        d = self.put(ins, ins.ops[0], "b32" if ty.endswith("x2") else "b16")
        bf, x2 = ty.startswith("bf"), ty.endswith("x2")

        def dec(u):
            return bf16_to_f32(u) if bf else u.view(F16).astype(F32)

        def enc(v):
            if bf:
                return f32_to_bf16(v)
            return v.astype(F16).view(U16)

        def run(S, i):
            a = [s(S, i) for s in src]
            if not x2:
                d(S, i, enc(f(*[dec(np.ascontiguousarray(x)) for x in a])))
                return
            lo = enc(f(*[dec((x & U32(0xFFFF)).astype(U16)) for x in a]))
            hi = enc(f(*[dec((x >> U32(16)).astype(U16)) for x in a]))
            d(S, i, lo.astype(U32) | (hi.astype(U32) << U32(16)))

        return "x", run

    def is_half(self, ty):
        return ty in ("f16", "bf16", "f16x2", "bf16x2")

    def addr(self, ins, t):
        """'[reg+imm]' -> (space of a named symbol or None, f(S, idx) -> int64 addresses)."""
        t = t.strip()
        if not (t.startswith("[") and t.endswith("]")):
            raise self.err(ins, f"address {t!r}")
        m = re.match(r"^([%\w$@.]+)\s*(?:\+\s*(-?\w+))?$", t[1:-1].strip())
        if not m:
            raise self.err(ins, f"address {t!r}")
        b, off = m.group(1), int(m.group(2), 0) if m.group(2) else 0
        r = self.reg(b)
        if r is not None:
            k, rdt = r
            if np.dtype(rdt).itemsize == 4:
                return None, lambda S, i: (S.R[k] if i is None else S.R[k][i]).astype(np.int64) + off
            return None, lambda S, i: (S.R[k] if i is None else S.R[k][i]).view(np.int64) + off
        if NUMBER.match(b):
            c = np.array([parse_number(b)[1] + off], np.int64)
            return None, lambda S, i: c
        if b in self.E.params:
            c = np.array([self.E.params[b][0] + off], np.int64)
            return "param", lambda S, i: c
        a = self.symaddr(b)
        if a is None:
            raise self.err(ins, f"address {t!r}")
        c = np.array([a + off], np.int64)
        return self.symspace(b), lambda S, i: c

    def space(self, ins, sym):
        """The state space that an access names, else "generic" for a named symbol, else None."""
        for m in ins.mods:
            m = m.split("::")[0]
            if m in ("global", "shared", "local", "param", "const"):
                return "global" if m == "const" else m
        return None if sym is None else "generic"
