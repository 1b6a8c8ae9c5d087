"""What the instructions of control flow mean: branches, barriers, traps, calls; and those that do nothing here."""

import numpy as np

from .parser import split_operands
from .values import U32, U64, DeviceAssert


class Control:
    """Makers ``op_NAME`` of steps; see Code."""

    def _nop(self, ins):
        return "x", lambda S, i: None

    op_membar = op_fence = op_prefetch = op_prefetchu = op_nanosleep = op_pmevent = op_discard = op_applypriority = op_griddepcontrol = _nop

    def op_createpolicy(self, ins):
        d = self.put(ins, ins.ops[0], "b64")
        return "x", lambda S, i: d(S, i, np.zeros(1, U64))

    def op_trap(self, ins):
        def run(S, i):
            raise DeviceAssert(f"trap: {S.where(ins, 0 if i is None else int(i[0]))}")

        return "x", run

    def op_call(self, ins):
        name = next((o for o in ins.ops if not o.startswith("(")), "?")
        args = split_operands(ins.ops[-1][1:-1]) if ins.ops[-1].startswith("(") else []
        if name == "vprintf":  # prints nothing
            d = self.put(ins, ins.ops[0][1:-1].strip(), "b32")
            return "x", lambda S, i: d(S, i, np.zeros(1, U32))
        if name != "__assertfail":
            raise self.err(ins, "call of a device function")
        a = [self.get(ins, x, "b32" if k == 2 else "b64") for k, x in enumerate(args)]

        def run(S, i):
            at = np.flatnonzero(S.real) if i is None else i
            v = [int(x(S, at)[0]) for x in a]

            def text(p):
                b = S.mem.mem[p - S.mem.base : p - S.mem.base + 512].tobytes()
                return b.split(b"\0")[0].decode(errors="replace")

            raise DeviceAssert(f"assertion '{text(v[0])}' failed at {text(v[1])}:{v[2]} in {text(v[3])}: {S.where(ins, int(at[0]))}")

        return "x", run

    op_brkpt = op_trap

    def op_bar(self, ins):
        if "warp" in ins.mods:
            m = self.get(ins, ins.ops[0], "u32")

            def run(S, i):
                S.wepoch[np.unique((S.all if i is None else i) >> 5)] += 1

            return "w", (run, m)
        if "arrive" in ins.mods:
            raise self.err(ins, "bar.arrive")
        red = next((m for m in ins.mods if m in ("popc", "and", "or")), None)
        ops = list(ins.ops)
        d = pr = None
        if red:
            d = self.put(ins, ops[0], "u32" if red == "popc" else "pred")
            pr = self.get(ins, ops[-1], "pred")
            ops = ops[1:-1]
        bid = self.get(ins, ops[0], "u32")
        cnt = self.get(ins, ops[1], "u32") if len(ops) > 1 else None
        return "b", (bid, cnt, red, d, pr)

    op_barrier = op_bar

    def op_bra(self, ins):
        t = ins.ops[0]
        if t not in self.E.labels:
            raise self.err(ins, f"label {t}")
        return "j", self.E.labels[t]

    def op_brx(self, ins):
        tab = np.array([self.E.labels[x] for x in self.E.tables[ins.ops[1]]], np.int64)
        g = self.get(ins, ins.ops[0], "u32")
        return "t", lambda S, i: tab[np.broadcast_to(g(S, i), (S.N if i is None else i.size,)).astype(np.int64)]

    def op_ret(self, ins):
        return "e", None

    op_exit = op_ret
