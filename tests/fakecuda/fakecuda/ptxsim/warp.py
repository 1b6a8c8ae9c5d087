"""What the instructions of a whole warp mean: shuffles, votes, matches, reductions."""

import numpy as np

from .values import U32


class Warp:
    """Makers ``op_NAME`` of steps; see Code."""

    def op_shfl(self, ins):
        if "sync" not in ins.mods:
            raise self.err(ins, "shfl without .sync")
        mode = next(m for m in ins.mods if m in ("up", "down", "bfly", "idx"))
        ds = [x.strip() for x in ins.ops[0].split("|")]
        d = self.put(ins, ds[0], "b32")
        p = self.put(ins, ds[1], "pred") if len(ds) > 1 else None
        a, b, c, m = [self.get(ins, o, "u32") for o in ins.ops[1:5]]

        def run(S, i):
            idx = S.all if i is None else i
            lane = S.lane if i is None else S.lane[i]
            bv = (b(S, i) & U32(31)).astype(np.int64)
            cv = c(S, i).astype(np.int64)
            seg, cl = (cv >> 8) & 31, cv & 31
            mx = (lane & seg) | (cl & ~seg)
            mn = lane & seg
            if mode == "up":
                j = lane - bv
                ok = j >= mx
            elif mode == "down":
                j = lane + bv
                ok = j <= mx
            elif mode == "bfly":
                j = lane ^ bv
                ok = j <= mx
            else:
                j = mn | (bv & ~seg)
                ok = j <= mx
            j = np.where(ok, j, lane)
            src = (idx & ~31) + j
            full = np.broadcast_to(a(S, None), (S.N,))
            if i is not None:
                part = np.zeros(S.N, np.bool_)
                part[i] = True
                if not part[src].all():
                    k = int(np.argmin(part[src]))
                    S.issue("shuffle", ins, int(idx[k]), f"reads lane {int(j[k])}, which does not execute it")
            d(S, i, full[src])
            if p is not None:
                p(S, i, ok)

        return "w", (run, m)

    def _warpwise(self, S, i, per_warp):
        """Call per_warp(thread indices of one warp) for each warp of the group."""
        idx = S.all if i is None else i
        w = idx >> 5
        cut = np.flatnonzero(np.diff(w)) + 1
        for seg in np.split(idx, cut):
            per_warp(seg)

    def op_vote(self, ins):
        if "sync" not in ins.mods:
            raise self.err(ins, "vote without .sync")
        mode = next(m for m in ins.mods if m in ("all", "any", "uni", "ballot"))
        g, m = self.get(ins, ins.ops[1], "pred"), self.get(ins, ins.ops[2], "u32")
        d = self.put(ins, ins.ops[0], "b32" if mode == "ballot" else "pred")

        def run(S, i):
            idx = S.all if i is None else i
            pv = np.broadcast_to(g(S, i), idx.shape)
            bits = np.zeros(S.N // 32, U32)
            act = np.zeros(S.N // 32, U32)
            np.bitwise_or.at(bits, idx >> 5, np.where(pv, U32(1) << (idx & 31).astype(U32), U32(0)))
            np.bitwise_or.at(act, idx >> 5, U32(1) << (idx & 31).astype(U32))
            mm = m(S, i)
            bb, aa = bits[idx >> 5] & mm, act[idx >> 5] & mm
            d(S, i, bb if mode == "ballot" else (bb == aa) if mode == "all" else (bb != 0) if mode == "any" else (bb == 0) | (bb == aa))

        return "w", (run, m)

    def op_match(self, ins):
        ty = self.ty(ins)
        mode = next(m for m in ins.mods if m in ("any", "all"))
        ds = [x.strip() for x in ins.ops[0].split("|")]
        d, p = self.put(ins, ds[0], "b32"), self.put(ins, ds[1], "pred") if len(ds) > 1 else None
        g, m = self.get(ins, ins.ops[1], ty), self.get(ins, ins.ops[2], "u32")

        def run(S, i):
            full = np.broadcast_to(g(S, None), (S.N,))
            mm = np.broadcast_to(m(S, None), (S.N,))

            def one(seg):
                for t in seg:
                    peers = [u for u in seg if mm[t] >> U32(u & 31) & U32(1)]
                    same = [u for u in peers if full[u] == full[t]]
                    bits = sum(1 << (int(u) & 31) for u in (same if mode == "any" or len(same) == len(peers) else []))
                    d(S, np.array([t]), np.array([bits], U32))
                    if p is not None:
                        p(S, np.array([t]), np.array([len(same) == len(peers)]))

            self._warpwise(S, i, one)

        return "w", (run, m)

    def op_redux(self, ins):
        ty = self.ty(ins)
        op = next(m for m in ins.mods if m in ("add", "min", "max", "and", "or", "xor"))
        f = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[op]
        d, g, m = self.put(ins, ins.ops[0], ty), self.get(ins, ins.ops[1], ty), self.get(ins, ins.ops[2], "u32")

        def run(S, i):
            full = np.broadcast_to(g(S, None), (S.N,))

            def one(seg):
                d(S, seg, np.full(seg.size, f.reduce(full[seg], dtype=full.dtype), full.dtype))

            self._warpwise(S, i, one)

        return "w", (run, m)

    def op_elect(self, ins):
        ds = [x.strip() for x in ins.ops[0].split("|")]
        d, p, m = self.put(ins, ds[0], "b32"), self.put(ins, ds[1], "pred"), self.get(ins, ins.ops[1], "u32")

        def run(S, i):
            def one(seg):
                d(S, seg, np.full(seg.size, seg[0] & 31, U32))
                p(S, seg, seg == seg[0])

            self._warpwise(S, i, one)

        return "w", (run, m)

    def op_activemask(self, ins):
        d = self.put(ins, ins.ops[0], "b32")

        def run(S, i):
            idx = S.all if i is None else i
            act = np.zeros(S.N // 32, U32)
            np.bitwise_or.at(act, idx >> 5, U32(1) << (idx & 31).astype(U32))
            d(S, i, act[idx >> 5])

        return "x", run
