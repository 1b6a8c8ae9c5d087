"""What the instructions that compare and select mean."""

import numpy as np

from .rounding import bf16_to_f32, flush
from .values import F32, TYPES


class Compare:
    """Makers ``op_NAME`` of steps; see Code."""

    _CMP = {"eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}

    def _cmp(self, ins, ty):
        c = ins.mods[0]
        fl = np.dtype(TYPES[ty]).kind == "f" or self.is_half(ty)
        base = {
            "eq": lambda a, b: a == b,
            "ne": lambda a, b: a != b,
            "lt": lambda a, b: a < b,
            "le": lambda a, b: a <= b,
            "gt": lambda a, b: a > b,
            "ge": lambda a, b: a >= b,
        }
        if c == "num":
            return lambda a, b: ~(np.isnan(a) | np.isnan(b))
        if c == "nan":
            return lambda a, b: np.isnan(a) | np.isnan(b)
        if fl and c in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
            f = base[c[:2]]
            return lambda a, b: f(a, b) | np.isnan(a) | np.isnan(b)
        if c not in self._CMP:
            raise self.err(ins)
        f = base[self._CMP[c]]
        if fl and c == "ne":
            return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
        return f

    def _cmpsrc(self, ins, ty, t):
        if ty == "bf16":
            g = self.get(ins, t, "b16")
            return lambda S, i: bf16_to_f32(g(S, i))
        if ty in ("f16x2", "bf16x2"):
            raise self.err(ins, "packed compare")
        return self.get(ins, t, ty)

    def op_setp(self, ins):
        ty = self.ty(ins)
        f = self._cmp(ins, ty)
        a, b = self._cmpsrc(ins, ty, ins.ops[1]), self._cmpsrc(ins, ty, ins.ops[2])
        ds = [x.strip() for x in ins.ops[0].split("|")]
        d = [self.put(ins, x, "pred") for x in ds]
        bop = next((m for m in ins.mods[1:] if m in ("and", "or", "xor")), None)
        c = self.get(ins, ins.ops[3], "pred") if bop else None
        ftz = "ftz" in ins.mods
        comb = {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y, None: lambda x, y: x}[bop]

        def run(S, i):
            x, y = a(S, i), b(S, i)
            if ftz:
                x, y = flush(x), flush(y)
            r = f(x, y)
            q = c(S, i) if c else None
            d[0](S, i, comb(r, q))
            if len(d) > 1:
                d[1](S, i, comb(~r, q))

        return "x", run

    def op_set(self, ins):
        ts = [m for m in ins.mods if m in TYPES]
        f = self._cmp(ins, ts[1])
        a, b, d = self._cmpsrc(ins, ts[1], ins.ops[1]), self._cmpsrc(ins, ts[1], ins.ops[2]), self.put(ins, ins.ops[0], ts[0])
        if len(ins.ops) > 3:
            raise self.err(ins)
        dt = TYPES[ts[0]]
        one = dt(1.0) if dt is F32 else np.array(-1).astype(dt)
        return "x", lambda S, i: d(S, i, np.where(f(a(S, i), b(S, i)), one, dt(0)).astype(dt))

    def op_selp(self, ins):
        ty = self.ty(ins)
        ty = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}.get(ty, ty)
        a, b, p, d = (
            self.get(ins, ins.ops[1], ty),
            self.get(ins, ins.ops[2], ty),
            self.get(ins, ins.ops[3], "pred"),
            self.put(ins, ins.ops[0], ty),
        )
        return "x", lambda S, i: d(S, i, np.where(p(S, i), a(S, i), b(S, i)))

    def op_slct(self, ins):
        ts = [m for m in ins.mods if m in TYPES]
        a, b, c, d = (
            self.get(ins, ins.ops[1], ts[0]),
            self.get(ins, ins.ops[2], ts[0]),
            self.get(ins, ins.ops[3], ts[1]),
            self.put(ins, ins.ops[0], ts[0]),
        )
        return "x", lambda S, i: d(S, i, np.where(c(S, i) >= 0, a(S, i), b(S, i)))
