"""What the instructions on bits mean: logic, shifts, fields, permutation of bytes."""

import numpy as np

from .parser import Inst, parse_number
from .values import TYPES, U32, U64, UINT


class Bits:
    """Makers ``op_NAME`` of steps; see Code."""

    def _bits(self, ins, f):
        ty = self.ty(ins)
        if ty == "pred":
            gs = [self.get(ins, o, "pred") for o in ins.ops[1:]]
            d = self.put(ins, ins.ops[0], "pred")
            return "x", lambda S, i: d(S, i, f(*[g(S, i) for g in gs]))
        return self.simple(ins, f, ty)

    def op_and(self, ins):
        return self._bits(ins, lambda a, b: a & b)

    def op_or(self, ins):
        return self._bits(ins, lambda a, b: a | b)

    def op_xor(self, ins):
        return self._bits(ins, lambda a, b: a ^ b)

    def op_not(self, ins):
        return self._bits(ins, lambda a: ~a)

    def op_cnot(self, ins):
        return self.simple(ins, lambda a: (a == 0).astype(a.dtype))

    def _shift(self, ins, left):
        ty = self.ty(ins)
        dt = np.dtype(TYPES[ty])
        nb = 8 * dt.itemsize
        a, b, d = self.get(ins, ins.ops[1], ty), self.get(ins, ins.ops[2], "u32"), self.put(ins, ins.ops[0], ty)

        def run(S, i):
            x, n = a(S, i), b(S, i)
            m = np.minimum(n, U32(nb - 1)).astype(dt)
            if left:
                v = np.where(n >= nb, dt.type(0), x << m)
            elif dt.kind == "i":
                v = x >> m
            else:
                v = np.where(n >= nb, dt.type(0), x >> m)
            d(S, i, v.astype(dt, copy=False))

        return "x", run

    def op_shl(self, ins):
        return self._shift(ins, True)

    def op_shr(self, ins):
        return self._shift(ins, False)

    def op_shf(self, ins):
        left, clamp = "l" in ins.mods, "clamp" in ins.mods

        def f(a, b, c):
            n = (np.minimum(c, U32(32)) if clamp else c & U32(31)).astype(U64)
            v = (b.astype(U64) << U64(32)) | a.astype(U64)
            return ((v << n) >> U64(32)).astype(U32) if left else ((v >> n) & U64(0xFFFFFFFF)).astype(U32)

        return self.simple(ins, f, "b32")

    def op_prmt(self, ins):
        if any(m in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16") for m in ins.mods):
            raise self.err(ins, "prmt mode")

        def f(a, b, s):
            a, b, s = np.broadcast_arrays(a, b, s)
            v = a.astype(U64) | (b.astype(U64) << U64(32))
            r = np.zeros(a.shape, U32)
            for k in range(4):
                sel = (s >> U32(4 * k)) & U32(15)
                by = (v >> ((sel & U32(7)).astype(U64) * U64(8))) & U64(255)
                by = np.where((sel & U32(8)) != 0, np.where((by & U64(128)) != 0, U64(255), U64(0)), by)
                r |= by.astype(U32) << U32(8 * k)
            return r

        return self.simple(ins, f, "b32")

    def op_lop3(self, ins):
        lut = parse_number(ins.ops[4])[1]

        def f(a, b, c):
            r = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), U32)
            for k in range(8):
                if lut >> k & 1:
                    r |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
            return r

        ins2 = Inst(ins.op, ins.mods, ins.ops[:4], ins.guard, ins.line, ins.loc, ins.text)
        return self.simple(ins2, f, "b32")

    def op_popc(self, ins):
        return self.simple(ins, lambda a: np.bitwise_count(a).astype(U32), self.ty(ins), "u32")

    def op_clz(self, ins):
        ty = self.ty(ins)
        nb = 8 * np.dtype(TYPES[ty]).itemsize
        return self.simple(ins, lambda a: (nb - bit_length(a)).astype(U32), ty, "u32")

    def op_bfind(self, ins):
        ty = self.ty(ins)
        dt = np.dtype(TYPES[ty])
        nb = 8 * dt.itemsize
        sh = "shiftamt" in ins.mods

        def f(a):
            if dt.kind == "i":
                a = np.where(a < 0, ~a, a)
            p = bit_length(a.view(UINT[dt.itemsize])) - 1
            return np.where(p < 0, U32(0xFFFFFFFF), ((nb - 1 - p) if sh else p).astype(U32))

        return self.simple(ins, f, ty, "u32")

    def op_brev(self, ins):
        ty = self.ty(ins)
        nb = 8 * np.dtype(TYPES[ty]).itemsize

        def f(a):
            r = np.zeros_like(a)
            t = a.dtype.type
            for k in range(nb):
                r |= ((a >> t(k)) & t(1)) << t(nb - 1 - k)
            return r

        return self.simple(ins, f, ty)

    def op_bfe(self, ins):
        ty = self.ty(ins)
        dt = np.dtype(TYPES[ty])
        nb = 8 * dt.itemsize
        a, b, c, d = (
            self.get(ins, ins.ops[1], ty),
            self.get(ins, ins.ops[2], "u32"),
            self.get(ins, ins.ops[3], "u32"),
            self.put(ins, ins.ops[0], ty),
        )

        def run(S, i):
            x, p, n = np.broadcast_arrays(a(S, i), b(S, i) & U32(255), c(S, i) & U32(255))
            u = x.astype(np.int64) if dt.kind == "i" else x.astype(U64)
            u = u.view(U64)
            sh = np.minimum(p, U32(63)).astype(U64)
            n2 = np.minimum(n, U32(nb)).astype(U64)
            v = np.where(
                p >= nb,
                U64(0) if dt.kind == "u" else np.where(x < 0, ~U64(0), U64(0)),
                (u.view(np.int64) >> sh.view(np.int64)).view(U64) if dt.kind == "i" else u >> sh,
            )
            m = np.where(n2 >= 64, ~U64(0), (U64(1) << n2) - U64(1))
            v = v & m
            if dt.kind == "i":
                s = (n2 > 0) & (n2 < 64) & ((v >> (np.maximum(n2, U64(1)) - U64(1)) & U64(1)) == 1)
                v = np.where(s, v | ~m, v)
            d(S, i, v.astype(UINT[dt.itemsize]).view(dt))

        return "x", run

    def op_bfi(self, ins):
        ty = self.ty(ins)
        nb = 8 * np.dtype(TYPES[ty]).itemsize
        g = [
            self.get(ins, ins.ops[1], ty),
            self.get(ins, ins.ops[2], ty),
            self.get(ins, ins.ops[3], "u32"),
            self.get(ins, ins.ops[4], "u32"),
        ]
        d = self.put(ins, ins.ops[0], ty)

        def run(S, i):
            a, b, p, n = [x(S, i) for x in g]
            p, n = (p & U32(255)).astype(U64), np.minimum(n & U32(255), U32(nb)).astype(U64)
            m = np.where(n >= 64, ~U64(0), (U64(1) << np.minimum(n, U64(63))) - U64(1))
            m = np.where(p >= nb, U64(0), m << np.minimum(p, U64(63)))
            v = (b.astype(U64) & ~m) | ((a.astype(U64) << np.minimum(p, U64(63))) & m)
            d(S, i, v.astype(TYPES[ty]))

        return "x", run


def bit_length(a):
    a = a.astype(U64)
    n = np.zeros(a.shape, np.int64)
    for s in (32, 16, 8, 4, 2, 1):
        big = a >= (U64(1) << U64(s))
        n += np.where(big, s, 0)
        a = np.where(big, a >> U64(s), a)
    return n + (a > 0)
