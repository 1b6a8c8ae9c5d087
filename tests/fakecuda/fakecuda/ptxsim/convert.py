"""What the instructions that move and convert values mean."""

import numpy as np

from .parser import split_operands
from .rounding import bf16_to_f32, f32_to_bf16, flush, narrow, to_half, to_odd
from .values import F16, F32, F64, LOCAL_BASE, SHARED_BASE, TYPES, U16, U32, U64, UINT, WINDOW


class Convert:
    """Makers ``op_NAME`` of steps; see Code."""

    def op_mov(self, ins):
        ty = self.ty(ins)
        d, s = ins.ops[0], ins.ops[1]
        if s.startswith("{"):
            parts = split_operands(s[1:-1])
            w = np.dtype(TYPES[ty]).itemsize // len(parts)
            gs = [self.get(ins, p, f"b{8 * w}") for p in parts]
            dst = self.put(ins, d, f"b{8 * w * len(parts)}")
            big = UINT[w * len(parts)]

            def pack(S, i):
                v = gs[0](S, i).astype(big)
                for k in range(1, len(gs)):
                    v = v | (gs[k](S, i).astype(big) << big(8 * w * k))
                dst(S, i, v)

            return "x", pack
        if d.startswith("{"):
            parts = split_operands(d[1:-1])
            tot = np.dtype(TYPES[ty]).itemsize
            w = tot // len(parts)
            g = self.get(ins, s, f"b{8 * tot}")
            ds = [self.put(ins, p, f"b{8 * w}") for p in parts]

            def unpack(S, i):
                v = g(S, i)
                for k, dd in enumerate(ds):
                    dd(S, i, (v >> UINT[tot](8 * w * k)).astype(UINT[w]))

            return "x", unpack
        if ty == "pred":
            g, dd = self.get(ins, s, "pred"), self.put(ins, d, "pred")
            return "x", lambda S, i: dd(S, i, g(S, i))
        return self.simple(ins, lambda a: a, ty)

    def op_cvta(self, ins):
        ty = self.ty(ins)
        to = "to" in ins.mods
        sp = "shared" if any(m.startswith("shared") for m in ins.mods) else "local" if "local" in ins.mods else "global"
        base = {"shared": SHARED_BASE, "local": LOCAL_BASE, "global": 0}[sp]
        if sp == "global" or any(m == "const" or m == "param" for m in ins.mods):
            base = 0
        b = np.dtype(TYPES[ty]).type(base)
        return self.simple(ins, (lambda a: a - b) if to else (lambda a: a + b), ty)

    def op_isspacep(self, ins):
        g, d = self.get(ins, ins.ops[1], "u64"), self.put(ins, ins.ops[0], "pred")
        sp = ins.mods[0]

        def run(S, i):
            a = g(S, i)
            sh = (a >= U64(SHARED_BASE)) & (a < U64(SHARED_BASE + WINDOW))
            lo = (a >= U64(LOCAL_BASE)) & (a < U64(LOCAL_BASE + WINDOW))
            d(S, i, sh if sp == "shared" else lo if sp == "local" else ~(sh | lo))

        return "x", run

    def op_cvt(self, ins):
        ts = [m for m in ins.mods if m in TYPES]
        if len(ts) != 2:
            raise self.err(ins)
        dt_, st_ = ts
        rm = next((m for m in ins.mods if m in ("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna")), None)
        sat, ftz, relu = "sat" in ins.mods, "ftz" in ins.mods, "relu" in ins.mods
        if dt_ in ("f16x2", "bf16x2"):
            hi, lo, d = self.get(ins, ins.ops[1], st_), self.get(ins, ins.ops[2], st_), self.put(ins, ins.ops[0], "b32")
            enc = f32_to_bf16 if dt_ == "bf16x2" else (lambda v: v.astype(F16).view(U16))
            if rm not in (None, "rn") or st_ != "f32":
                raise self.err(ins)

            def pk(S, i):
                high, low = hi(S, i), lo(S, i)
                if relu:
                    high, low = np.fmax(high, F32(0)), np.fmax(low, F32(0))
                high, low = np.broadcast_arrays(high, low)
                d(S, i, enc(low).astype(U32) | (enc(high).astype(U32) << U32(16)))

            return "x", pk
        if st_ == "bf16":
            g0 = self.get(ins, ins.ops[1], "b16")

            def g(S, i):
                return bf16_to_f32(g0(S, i))

            sk = "f"
        elif st_ in ("f16x2", "bf16x2") or dt_ == "tf32":
            raise self.err(ins)
        else:
            g = self.get(ins, ins.ops[1], st_)
            sk = np.dtype(TYPES[st_]).kind
        d = self.put(ins, ins.ops[0], "b16" if dt_ == "bf16" else dt_)
        dk = "f" if dt_ == "bf16" else np.dtype(TYPES[dt_]).kind
        D = TYPES[dt_]
        ifn = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}

        def run(S, i):
            v = g(S, i)
            if ftz and v.dtype == F32:
                v = flush(v)
            if sk == "f" and dk == "f":
                if rm in ifn:
                    v = ifn[rm](v)
                if sat:
                    v = np.where(np.isnan(v), v.dtype.type(0), np.clip(v, 0, 1))
                if relu:
                    v = np.fmax(v, v.dtype.type(0))
                if dt_ == "bf16":
                    v = v.astype(F32)
                    if rm == "rz":
                        v = (v.view(U32) >> U32(16)).astype(U16)
                    elif rm in (None, "rn"):
                        v = f32_to_bf16(v)
                    else:
                        raise self.err(ins, "rounding mode")
                elif D is F32 and v.dtype == F64:
                    v = narrow(v, rm or "rn")
                elif D is F16 and v.dtype != F16:
                    v = to_half(v, rm or "rn")
                else:
                    v = v.astype(D)
                if ftz and v.dtype == F32:
                    v = flush(v)
            elif sk == "f":
                v = ifn.get(rm, np.trunc)(v.astype(F64))
                info = np.iinfo(D)
                nan = np.isnan(v)
                hi = v >= float(info.max)
                lo = v <= float(info.min)
                w = np.where(nan | hi | lo, 0.0, v).astype(D)
                v = np.where(hi, D(info.max), np.where(lo, D(info.min), w))
                v = np.where(nan, D(0), v).astype(D)
            elif dk == "f":
                if rm in (None, "rn"):
                    v = f32_to_bf16(v.astype(F32)) if dt_ == "bf16" else v.astype(D)
                else:
                    if v.dtype.itemsize == 8 and D is F32:
                        f = v.astype(F64)
                        v = narrow(to_odd(f, (v.astype(np.longdouble) - f.astype(np.longdouble)).astype(F64)), rm)
                    else:
                        v = narrow(v.astype(F64), rm) if D is F32 else v.astype(D)
            else:
                if sat:
                    info = np.iinfo(D)
                    v = (
                        np.array([min(max(int(x), info.min), info.max) for x in v], D)
                        if v.size < 64
                        else np.clip(v.astype(np.longdouble), info.min, info.max).astype(D)
                    )
                v = v.astype(D)
            d(S, i, v)

        return "x", run
