"""What the arithmetic instructions mean."""

import numpy as np

from .rounding import addmul32, fma32, fminmax, narrow, to_odd, two_sum
from .values import F32, F64, TYPES, U8, U32, U64


def wide(dt):
    """The integer type of twice the width."""
    return {2: {"u": U32, "i": np.int32}, 4: {"u": U64, "i": np.int64}}[dt.itemsize][dt.kind]


class Arithmetic:
    """Makers ``op_NAME`` of steps; see Code."""

    def _arith(self, ins, op):
        ty = self.ty(ins)
        if "cc" in ins.mods:
            raise self.err(ins, "carry")
        if self.is_half(ty):
            return self.halfs(ins, {"add": lambda a, b: a + b, "sub": lambda a, b: a - b}[op], ty)
        mode = self.rnd(ins)
        if ty == "f32" and mode != "rn":
            return self.simple(
                ins, (lambda a, b: addmul32("add", a, b, mode)) if op == "add" else (lambda a, b: addmul32("add", a, -b, mode)), ty
            )
        if ty == "s32" and "sat" in ins.mods:
            return self.simple(
                ins,
                lambda a, b: np.clip(
                    a.astype(np.int64) + (b.astype(np.int64) if op == "add" else -b.astype(np.int64)), -(2**31), 2**31 - 1
                ).astype(np.int32),
                ty,
            )
        return self.simple(ins, (lambda a, b: a + b) if op == "add" else (lambda a, b: a - b), ty)

    def op_add(self, ins):
        return self._arith(ins, "add")

    def op_sub(self, ins):
        return self._arith(ins, "sub")

    @staticmethod
    def _mulhi(a, b):
        dt = a.dtype if a.size >= b.size else b.dtype
        if dt.itemsize <= 4:
            w = wide(dt)
            return ((a.astype(w) * b.astype(w)) >> w(8 * dt.itemsize)).astype(dt)
        m = U64(0xFFFFFFFF)
        x, y = a.view(U64), b.view(U64)
        xl, xh, yl, yh = x & m, x >> U64(32), y & m, y >> U64(32)
        t = xl * yl
        u = xh * yl + (t >> U64(32))
        v = xl * yh + (u & m)
        h = xh * yh + (u >> U64(32)) + (v >> U64(32))
        if dt.kind == "i":
            h = h - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
        return h.view(dt)

    def op_mul(self, ins):
        ty = self.ty(ins)
        dt = np.dtype(TYPES[ty])
        if self.is_half(ty):
            return self.halfs(ins, lambda a, b: a * b, ty)
        if dt.kind == "f":
            mode = self.rnd(ins)
            if ty == "f32" and mode != "rn":
                return self.simple(ins, lambda a, b: addmul32("mul", a, b, mode), ty)
            return self.simple(ins, lambda a, b: a * b, ty)
        if "wide" in ins.mods:
            w = wide(dt)
            return self.simple(
                ins,
                lambda a, b: a.astype(w) * b.astype(w),
                ty,
                {4: "u32", 8: "u64"}[np.dtype(w).itemsize] if dt.kind == "u" else {4: "s32", 8: "s64"}[np.dtype(w).itemsize],
            )
        if "hi" in ins.mods:
            return self.simple(ins, self._mulhi, ty)
        return self.simple(ins, lambda a, b: a * b, ty)

    def op_mul24(self, ins):
        ty = self.ty(ins)
        return self.simple(ins, lambda a, b: ((a.astype(np.int64) & 0xFFFFFF) * (b.astype(np.int64) & 0xFFFFFF)).astype(TYPES[ty]), ty)

    def op_mad(self, ins):
        ty = self.ty(ins)
        dt = np.dtype(TYPES[ty])
        if dt.kind == "f":
            return self.op_fma(ins)
        if "cc" in ins.mods:
            raise self.err(ins, "carry")
        if "wide" in ins.mods:
            w = wide(dt)
            wt = {("u", 4): "u32", ("i", 4): "s32", ("u", 8): "u64", ("i", 8): "s64"}[(dt.kind, np.dtype(w).itemsize)]
            a, b = self.get(ins, ins.ops[1], ty), self.get(ins, ins.ops[2], ty)
            c, d = self.get(ins, ins.ops[3], wt), self.put(ins, ins.ops[0], wt)
            return "x", lambda S, i: d(S, i, a(S, i).astype(w) * b(S, i).astype(w) + c(S, i))
        if "hi" in ins.mods:
            return self.simple(ins, lambda a, b, c: self._mulhi(a, b) + c, ty)
        return self.simple(ins, lambda a, b, c: a * b + c, ty)

    def op_fma(self, ins):
        ty = self.ty(ins)
        if self.is_half(ty):
            relu = "relu" in ins.mods

            def hf(a, b, c):
                v = to_odd(*two_sum(a.astype(F64) * b.astype(F64), c.astype(F64)))
                v = np.maximum(v, 0) if relu else v
                if not ty.startswith("bf"):
                    return v
                t = narrow(v, "rz")  # float32 rounded to odd, so that the step to bf16 is exact
                return (
                    (np.ascontiguousarray(t).view(U32) | (t.astype(F64) != v).astype(U32)).view(F32)
                    if np.isfinite(t).all()
                    else v.astype(F32)
                )

            return self.halfs(ins, hf, ty)
        if ty == "f64":
            return self.simple(ins, lambda a, b, c: (a.astype(np.longdouble) * b + c).astype(F64), ty)
        mode = self.rnd(ins)
        return self.simple(ins, lambda a, b, c: fma32(a, b, c, mode), ty)

    def op_sad(self, ins):
        return self.simple(ins, lambda a, b, c: np.where(a > b, a - b, b - a) + c, self.ty(ins))

    def op_dp4a(self, ins):
        ts = [m for m in ins.mods if m in TYPES]
        a, b = self.get(ins, ins.ops[1], "b32"), self.get(ins, ins.ops[2], "b32")
        c, d = self.get(ins, ins.ops[3], "s32"), self.put(ins, ins.ops[0], "s32")

        def run(S, i):
            x, y = a(S, i), b(S, i)
            v = c(S, i).astype(np.int64)
            for k in range(4):
                e, f = [
                    (q >> U32(8 * k)).astype(U8).view(np.int8 if t == "s32" else U8).astype(np.int64) for q, t in ((x, ts[0]), (y, ts[1]))
                ]
                v = v + e * f
            d(S, i, v.astype(np.int32))

        return "x", run

    def op_div(self, ins):
        ty = self.ty(ins)
        dt = np.dtype(TYPES[ty])
        if dt.kind == "f":
            mode = self.rnd(ins)
            if mode != "rn" and ty == "f32":
                return self.simple(ins, lambda a, b: narrow(a.astype(F64) / b.astype(F64), mode), ty)
            return self.simple(ins, lambda a, b: a / b, ty)
        return self.simple(ins, lambda a, b: self._idiv(a, b)[0], ty)

    def op_rem(self, ins):
        return self.simple(ins, lambda a, b: self._idiv(a, b)[1], self.ty(ins))

    @staticmethod
    def _idiv(a, b):
        a, b = np.broadcast_arrays(a, b)
        z = b == 0
        bb = np.where(z, b.dtype.type(1), b)
        if a.dtype.kind == "u":
            q = a // bb
        else:
            q = a // bb
            q = q + ((q * bb != a) & ((a < 0) != (bb < 0)))
        r = a - q * bb
        return np.where(z, np.array(-1).astype(a.dtype), q).astype(a.dtype), np.where(z, a, r).astype(a.dtype)

    def op_min(self, ins):
        return self._minmax(ins, "min")

    def op_max(self, ins):
        return self._minmax(ins, "max")

    def _minmax(self, ins, op):
        ty = self.ty(ins)
        nan = "NaN" in ins.mods
        if self.is_half(ty):
            return self.halfs(ins, lambda a, b: fminmax(op, a, b, nan), ty)
        if np.dtype(TYPES[ty]).kind == "f":

            def mm(*a):
                v = a[0]
                for b in a[1:]:
                    v = fminmax(op, v, b, nan)
                return v

            return self.simple(ins, mm, ty)
        return self.simple(ins, np.minimum if op == "min" else np.maximum, ty)

    def op_neg(self, ins):
        ty = self.ty(ins)
        if self.is_half(ty):
            return self.halfs(ins, lambda a: -a, ty)
        return self.simple(ins, (lambda a: -a) if np.dtype(TYPES[ty]).kind != "u" else (lambda a: (~a) + 1), ty)

    def op_abs(self, ins):
        ty = self.ty(ins)
        if self.is_half(ty):
            return self.halfs(ins, np.abs, ty)
        return self.simple(ins, np.abs, ty)

    def op_copysign(self, ins):
        return self.simple(ins, lambda a, b: np.copysign(b, a), self.ty(ins))

    def _unary(self, f):
        def h(ins):
            ty = self.ty(ins)
            if self.is_half(ty):
                return self.halfs(ins, lambda a: f(a.astype(F64)).astype(F32), ty)
            if ty == "f64":
                return self.simple(ins, f, ty)
            mode = self.rnd(ins)
            return self.simple(ins, lambda a: narrow(f(a.astype(F64)), mode), ty)

        return h

    def op_ex2(self, ins):
        return self._unary(np.exp2)(ins)

    def op_lg2(self, ins):
        return self._unary(np.log2)(ins)

    def op_sin(self, ins):
        return self._unary(np.sin)(ins)

    def op_cos(self, ins):
        return self._unary(np.cos)(ins)

    def op_tanh(self, ins):
        return self._unary(np.tanh)(ins)

    def op_rcp(self, ins):
        return self._unary(lambda a: 1.0 / a)(ins)

    def op_sqrt(self, ins):
        return self._unary(np.sqrt)(ins)

    def op_rsqrt(self, ins):
        return self._unary(lambda a: 1.0 / np.sqrt(a))(ins)

    def op_testp(self, ins):
        ty, k = self.ty(ins), ins.mods[0]
        tiny = np.finfo(TYPES[ty]).tiny
        f = {
            "finite": np.isfinite,
            "infinite": np.isinf,
            "number": lambda a: ~np.isnan(a),
            "notanumber": np.isnan,
            "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
            "subnormal": lambda a: (a != 0) & (np.abs(a) < tiny),
        }[k]
        return self.simple(ins, f, ty, "pred")
