"""Running some blocks together: which threads go next, warp-level synchronisation, barriers, deadlock."""

import math

import numpy as np

from .counters import Counting
from .hazards import Hazards
from .memory import Memory
from .values import BAR, DONE, RUN, U8, U32, UINT, WARP, WSYNC, DeadlockError, align

NOWHERE = np.int64(1 << 40)  # program counter of a thread that cannot run
FAIRNESS = 64  # every so many scheduling steps the warp that has waited longest goes
STRAY = 4096  # and every so many a thread other than its warp's lowest program counter
SEEDED_SHARE = 0.7  # of the warps at the chosen instruction, under a seed


class Wave(Memory, Counting, Hazards):
    """Some blocks running together.

    Threads are numbered through the wave, every block padded to whole warps. A group of threads is given as their indices, or
    None for all of them. Each thread has a program counter; those of a warp that share its lowest one run together.
    """

    def __init__(self, code, mem, pbuf, blocks, grid, block, dyn, rep, rng, options):
        E = code.E
        self.E, self.code, self.mem, self.pbuf, self.rep, self.rng = E, code, mem, pbuf, rep, rng
        self.races, self.stats, self.max_steps = options.races, options.stats, options.max_steps
        nt = math.prod(block)
        self.nb, self.npad = len(blocks), align(nt, WARP)
        self.N = N = self.nb * self.npad
        self.dyn, self.smem_bytes = dyn, code.dyn_base + int(dyn)
        self.all = np.arange(N, dtype=np.int64)
        self.lane = self.all & 31
        t = self.all % self.npad
        self.warp_in_block = t >> 5
        self.blk = self.all // self.npad
        self.block_ids = np.asarray(blocks, np.int64)
        bid = self.block_ids[self.blk]
        real = t < nt
        self.SP = {
            "tid": [t % block[0], t // block[0] % block[1], t // (block[0] * block[1])],
            "ntid": [np.array([x]) for x in block],
            "nctaid": [np.array([x]) for x in grid],
            "ctaid": [bid % grid[0], bid // grid[0] % grid[1], bid // (grid[0] * grid[1])],
        }
        banks = {dt: iter(np.zeros((E.reg_types.count(dt), N), dt)) for dt in set(E.reg_types)}
        self.R = [next(banks[dt]) for dt in E.reg_types]
        self.sstride = align(max(self.smem_bytes, 1), 16)
        self.smem = np.zeros(self.nb * self.sstride, U8)
        self.sviews = {k: self.smem.view(UINT[k]) for k in (1, 2, 4, 8)}
        self.lstride = align(max(E.local_bytes, 1), 16)
        self.lmem = np.zeros(N * self.lstride if E.local_bytes else 16, U8)
        self.lviews = {k: self.lmem.view(UINT[k]) for k in (1, 2, 4, 8)}
        self.pc = np.zeros(N, np.int64)
        self.state = np.where(real, RUN, DONE).astype(np.int8)
        self.padbits = self._lanes(~real)
        self.barid = np.zeros(N, np.int64)
        self.epoch = np.zeros(self.nb, np.int64)
        self.wepoch = np.zeros(N // WARP, np.int64)
        self.last = np.zeros(N // WARP, np.int64)  # step in which the warp ran last
        self.steps = 0
        self.counted = None, None, 0  # a group of threads, their warps, how many these are
        self._init_hazards()

    @staticmethod
    def _lanes(threads):
        """Lane mask per warp of a boolean per thread."""
        return np.packbits(threads.reshape(-1, WARP), axis=1, bitorder="little").view(U32)[:, 0]

    def where(self, ins, t):
        b = int(self.block_ids[self.blk[t]])
        x = [int(self.SP["tid"][k][t]) for k in range(3)]
        src = f", {ins.loc}" if ins.loc else ""
        return f"{self.E.name}: PTX line {ins.line}{src}: '{ins.text}': block {b}, thread ({x[0]},{x[1]},{x[2]})"

    def issue(self, kind, ins, t, msg):
        self.rep.add_issue(kind, ins, f"{msg}; {self.where(ins, t)}")

    def run(self):
        """Until every thread has ended. Raises what the instructions raise, and DeadlockError."""
        pc, state = self.pc, self.state
        while True:
            runnable = state == RUN
            ready = np.count_nonzero(runnable)
            if not ready:
                if (state == DONE).all():
                    break
                if not self._unstick():
                    self._deadlock()
                continue
            self._next_step()
            pcs = np.where(runnable, pc, NOWHERE)
            p, pick = self._choose(pcs, runnable)
            idx = np.flatnonzero((pcs == p) & np.repeat(pick, WARP))
            # While no other thread can run, the same group would be chosen again at every jump.
            alone = self.rng is None and idx.size == ready
            while p is not None:
                p = self._straight(p, idx, alone)
                if p is not None:
                    self._next_step()
            self.last[pick] = self.steps
        self.rep.steps += self.steps
        self.rep.blocks += self.nb

    def _next_step(self):
        self.steps += 1
        if self.steps > self.max_steps:
            raise DeadlockError(f"{self.E.name}: more than {self.max_steps} scheduling steps (endless loop?)")

    def _choose(self, pcs, runnable):
        """-> (program counter, which warps): the group to run next."""
        wmin = pcs.reshape(-1, WARP).min(1)
        if self.rng is not None:
            live = np.flatnonzero(wmin < NOWHERE)
            p = int(wmin[live[self.rng.integers(live.size)]])
            pick = (wmin == p) & (self.rng.random(wmin.size) < SEEDED_SHARE)
            return p, pick if pick.any() else wmin == p
        if self.steps % FAIRNESS == 0:
            p = int(wmin[np.argmin(np.where(wmin < NOWHERE, self.last, NOWHERE))])
            if self.steps % STRAY == 0:
                c = np.flatnonzero(runnable)
                p = int(self.pc[c[self.steps // STRAY * 7919 % c.size]])
                return p, (pcs.reshape(-1, WARP) == p).any(1)
            return p, wmin == p
        p = int(wmin.min())
        return p, wmin == p

    def _straight(self, p, idx, alone):
        """Run the threads ``idx`` from ``p`` up to control flow, a synchronisation or a place where others may join.

        -> where they all are, if nobody else can run (``alone``), else None.
        """
        pc, state, steps, leaders, R = self.pc, self.state, self.code.steps, self.code.leaders, self.R
        ninst = len(steps)
        i = None if idx.size == self.N else idx
        nw, nthr = self._warps(idx), idx.size
        first = end = p
        try:
            while True:
                if p >= ninst:
                    state[idx] = DONE
                    return None
                kind, fn, g, ins = steps[p] or self.code.step(p)
                end = p + 1
                if kind == "x" or kind == "m":
                    if g is None:
                        fn(self, i)
                    else:
                        pv = R[g[0]] if i is None else R[g[0]][i]
                        if g[1]:
                            pv = ~pv
                        holds = np.count_nonzero(pv)
                        if holds == idx.size:
                            fn(self, i)
                        elif holds:
                            fn(self, idx[pv])
                        else:
                            self.rep.skipped[p] += nw
                    p += 1
                    if p in leaders or (kind == "m" and self.rng is not None):
                        break
                elif kind == "j":
                    if g is None:
                        p = fn
                        break
                    pv = R[g[0]] if i is None else R[g[0]][i]
                    if g[1]:
                        pv = ~pv
                    taken = np.count_nonzero(pv)
                    if self.stats and nthr > 1:
                        self.rep.branches[p] += nw
                        if 0 < taken < nthr:
                            self.rep.divergent[p] += self._split_warps(idx, pv)
                    if taken in (0, nthr):
                        p = fn if taken else p + 1
                        break
                    pc[idx] = np.where(pv, fn, p + 1)
                    return None
                elif kind == "t":
                    pc[idx] = fn(self, i)
                    return None
                elif kind == "e":
                    if g is None:
                        state[idx] = DONE
                    else:
                        pv = R[g[0]][idx]
                        pv = ~pv if g[1] else pv
                        state[idx[pv]] = DONE
                        pc[idx] = p + 1
                    return None
                else:
                    if g is not None:  # the threads whose guard is false step over
                        pv = R[g[0]][idx]
                        pv = ~pv if g[1] else pv
                        pc[idx[~pv]] = p + 1
                        idx = idx[pv]
                        i = None if idx.size == self.N else idx
                        if idx.size == 0:
                            return None
                    if kind == "b":
                        pc[idx] = p
                        state[idx] = BAR
                        self.barid[idx] = fn[0](self, i)
                        self._bar_check()
                        return None
                    go, mask = fn
                    ready = self._warp_ready(p, idx, mask, i, ins)
                    if ready is not None:
                        if ready.size:
                            go(self, ready)
                            pc[ready] = p + 1
                            state[ready] = RUN
                        return None
                    go(self, i)
                    p += 1
                    if g is not None:
                        pc[idx] = p
                        return None
                    if p in leaders:
                        break
        finally:
            if self.stats:
                self.rep.issued[first:end] += nw
                self.rep.threads[first:end] += nthr
        if alone:
            return p
        pc[idx] = p
        return None

    def _warps(self, idx):
        w = idx >> 5
        return 1 + int(np.count_nonzero(w[1:] != w[:-1])) if idx.size else 0

    def _split_warps(self, idx, taken):
        """How many warps have threads on both sides of a branch."""
        w = idx >> 5
        yes = np.bincount(w - w[0], weights=taken)
        return int(((yes > 0) & (yes < np.bincount(w - w[0]))).sum())

    def _warp_ready(self, p, idx, mask, i, ins):
        """None if every member lane of every warp is here, else the threads that may go (others are parked)."""
        if i is None:
            return None
        bit = U32(1) << (self.lane[idx]).astype(U32)
        if idx.size == WARP * self._warps(idx) and (mask(self, i) & bit).all():
            return None  # whole warps
        here = np.zeros(self.N, np.bool_)
        here[idx] = True
        here |= (self.state == WSYNC) & (self.pc == p)
        arr, gone = self._lanes(here), self._lanes(self.state == DONE)
        cand = np.flatnonzero(here)
        bit = U32(1) << self.lane[cand].astype(U32)
        m = np.broadcast_to(mask(self, cand), cand.shape).astype(U32)
        w = cand >> 5
        inside = (m & bit) != 0
        if not inside.all():
            self.issue("membermask", ins, int(cand[np.argmin(inside)]), "executing lane is not in its own member mask")
        need = m & ~gone[w] | bit
        ok = (need & ~arr[w]) == 0
        exited = (m & gone[w] & ~self.padbits[w]) != 0
        if (ok & exited).any():
            self.issue("membermask", ins, int(cand[np.argmax(ok & exited)]), "member mask names lanes that have exited")
        if ok.all() and cand.size == idx.size:
            return None
        park = cand[~ok]
        self.pc[park] = p
        self.state[park] = WSYNC
        return cand[ok]

    def _bar_check(self):
        """Release every block whose barrier is complete. -> True if any was."""
        st = self.state.reshape(self.nb, -1)
        waiting = st == BAR
        done = st == DONE
        full = ((waiting | done).all(1)) & waiting.any(1)
        any_rel = False
        ids = self.barid.reshape(self.nb, -1)
        for b in np.flatnonzero(waiting.any(1)) if not full.all() or (ids != ids[0, 0]).any() else []:
            for bid in np.unique(ids[b][waiting[b]]):
                t = np.flatnonzero(waiting[b] & (ids[b] == bid)) + b * self.npad
                fn = self.code.steps[int(self.pc[t[0]])][1]
                if fn[1] is not None:
                    need = int(fn[1](self, t[:1])[0])
                    if t.size < need:
                        continue
                elif not full[b] or not (ids[b][waiting[b]] == bid).all():
                    continue
                self._release(t, np.array([b]))
                any_rel = True
        if full.all() and not (ids != ids[0, 0]).any():
            self._release(np.flatnonzero(self.state == BAR), np.arange(self.nb))
            any_rel = True
        return any_rel

    def _release(self, t, blocks):
        pcs = self.pc[t]
        for p in np.unique(pcs):
            bid, cnt, red, d, pr = self.code.steps[int(p)][1]
            if red:
                tt = t[pcs == p]
                v = np.broadcast_to(pr(self, tt), tt.shape)
                for b in np.unique(self.blk[tt]):
                    m = self.blk[tt] == b
                    x = v[m]
                    d(
                        self,
                        tt[m],
                        np.full(
                            m.sum(), x.sum() if red == "popc" else x.all() if red == "and" else x.any(), U32 if red == "popc" else np.bool_
                        ),
                    )
        if np.unique(pcs).size > 1:
            self.issue("barrier", self.code.steps[int(pcs[0])][3], int(t[0]), "threads of a block meet at different bar.sync instructions")
        self.rep.barriers += blocks.size
        self.epoch[blocks] += 1
        self.state[t] = RUN
        self.pc[t] += 1

    def _unstick(self):
        if self._bar_check():
            return True
        # lanes parked at a warp-sync whose missing members have exited
        any_ = False
        for p in np.unique(self.pc[self.state == WSYNC]):
            kind, fn, g, ins = self.code.steps[int(p)]
            c = np.flatnonzero((self.state == WSYNC) & (self.pc == p))
            self.state[c] = RUN
            r = self._warp_ready(int(p), c, fn[1], c, ins)
            ready = c if r is None else r
            if ready.size:
                fn[0](self, ready)
                self.pc[ready] = p + 1
                self.state[ready] = RUN
                any_ = True
        return any_

    def _deadlock(self):
        lines = []
        for s, nm in ((BAR, "at a barrier"), (WSYNC, "at a warp-level sync")):
            for p in np.unique(self.pc[self.state == s])[:4]:
                t = np.flatnonzero((self.state == s) & (self.pc == p))
                lines.append(f"{t.size} threads wait {nm}: {self.where(self.code.steps[int(p)][3], int(t[0]))}")
        raise DeadlockError("deadlock: " + "; ".join(lines))
