"""Findings about memory that threads share: races on shared memory, reads of what nobody wrote, conflicting global writes."""

import numpy as np

NOBODY, WARP_MATES, SEVERAL = -1, -2, -3  # in place of the number of a thread
ATOMIC = -2  # in place of the interval of a write


class Hazards:
    """What a Wave records about who touched which memory. Shared memory is followed in granules of ``G`` bytes: last writer, last
    reader (or SEVERAL), each with the number of the block's and the warp's synchronisation interval in which it happened."""

    def _init_hazards(self):
        self._gids = None
        self.G = self.code.granule
        if self.races and self.smem_bytes:
            n = self.nb * self.sstride // self.G
            self.Wt = np.full(n, NOBODY, np.int32)
            self.We = np.full(n, -1, np.int64)
            self.Ww = np.zeros(n, np.int64)
            self.Rt = np.full(n, NOBODY, np.int32)
            self.Re = np.full(n, -1, np.int64)
            self.Rwarp = np.zeros(n, np.int32)
            self.Rw = np.zeros(n, np.int64)

    def _race(self, ins, byte, i, nbytes, write, val, atomic=False):
        idx = self.all if i is None else i
        G = self.G
        k = max(1, nbytes // G)
        g = byte // G
        t = idx
        if k > 1:
            g = (g[:, None] + np.arange(k)).ravel()
            t = np.repeat(idx, k)
            val = None
        t = t.astype(np.int32)
        w = t >> 5
        ep, we = self.epoch[self.blk[t]], self.wepoch[w]
        wt = self.Wt[g]
        hit = self.We[g] == ep
        if not atomic and np.count_nonzero(hit):
            hit = hit & (wt != t) & (wt >= 0) & (((wt >> 5) != w) | (self.Ww[g] == we))
            if np.count_nonzero(hit):
                self._report_race("write-write" if write else "write-read", ins, g, t, wt, hit)
        if not write and not atomic:
            un = wt < 0
            if np.count_nonzero(un):
                q = int(np.argmax(un))
                self.issue("uninit", ins, int(t[q]), f"reads shared byte {int(g[q]) * G % self.sstride} that was never written")
            first = self.Re[g] != ep
            if np.count_nonzero(first):
                fg = g[first]
                self.Rt[fg] = t[first]
                self.Rwarp[fg] = w[first]
                self.Re[fg] = ep[first]
            cur = self.Rt[g]
            df = (cur != t) & (cur != SEVERAL)
            if np.count_nonzero(df):
                dw = self.Rwarp[g] != w
                self.Rt[g[df & dw]] = SEVERAL
                s = df & ~dw & (cur >= 0)
                self.Rt[g[s]] = np.where(self.Rt[g[s]] == SEVERAL, SEVERAL, WARP_MATES)
            self.Rw[g] = we
            return
        hit = self.Re[g] == ep
        if not atomic and np.count_nonzero(hit):
            rt = self.Rt[g]
            hit = hit & (rt != t) & (rt != NOBODY) & ((rt == SEVERAL) | (self.Rwarp[g] != w) | (self.Rw[g] == we))
            if np.count_nonzero(hit):
                self._report_race("read-write", ins, g, t, rt, hit)
        self.Wt[g] = t
        self.We[g] = ATOMIC if atomic else ep
        self.Ww[g] = we
        if not atomic:
            dup = self.Wt[g] != t
            if np.count_nonzero(dup):
                q = int(np.argmax(dup))
                same = False
                if val is not None:
                    v = np.broadcast_to(val, t.shape)
                    order = np.argsort(g, kind="stable")
                    gs, vs = g[order], v[order]
                    same = not ((gs[1:] == gs[:-1]) & (vs[1:] != vs[:-1])).any()
                if not same:
                    self.issue("race", ins, int(t[q]), "several threads write the same shared address in one instruction")

    def _gid(self, i):
        """Numbers of threads through the grid, from 1 on, so that 0 is nobody."""
        if self._gids is None:
            self._gids = self.block_ids[self.blk] * self.npad + self.all % self.npad + 1
        return self._gids if i is None else self._gids[i]

    @staticmethod
    def _words(off, gid, nbytes):
        k = max(1, nbytes // 4)
        wd = off >> 2
        return (wd, gid) if k == 1 else ((wd[:, None] + np.arange(k)).ravel(), np.repeat(gid, k))

    def _global_nc(self, ins, off, i, nbytes):
        gid = self._gid(i)
        wd, g = self._words(off, gid, nbytes)
        wr = self.mem.writer[wd]
        bad = (wr > 0) & (wr != g)
        if np.count_nonzero(bad):
            k = int(np.argmax(bad)) // max(1, nbytes // 4)
            self.issue(
                "nc-read-of-written",
                ins,
                int((self.all if i is None else i)[k]),
                f"ld.global.nc (__ldg / const __restrict__) of {self.mem.near(int(off[k]))}, which another thread wrote in this launch",
            )
        self.mem.ncreader[wd] = g

    def _global_write(self, ins, off, i, w, vals, old, view, e):
        gid = self._gid(i)
        idx = self.all if i is None else i
        wr = self.mem.writer
        wd0 = off >> 2
        prev = wr[wd0]
        if w >= 4:  # narrower stores of neighbours share a word: not tracked for write/write
            clash = (prev > 0) & ((prev - 1) // self.npad != (gid - 1) // self.npad)
            if np.count_nonzero(clash) and any((clash & (o != v)).any() for o, v in zip(old, vals)):
                k = int(np.argmax(clash))
                self.issue(
                    "global-write-write", ins, int(idx[k]), f"{self.mem.near(int(off[k]))} was written by another block with another value"
                )
            for k, v in enumerate(vals):
                lost = view[e + k] != v
                if np.count_nonzero(lost):
                    q = int(np.argmax(lost))
                    self.issue(
                        "global-write-write",
                        ins,
                        int(idx[q]),
                        f"several threads write {self.mem.near(int(off[q]))} in one instruction, with different values",
                    )
                    break
        wd, g = self._words(off, gid, w * len(vals))
        if w >= 4:
            rd = self.mem.ncreader[wd]
            bad = (rd > 0) & (rd != g)
            if np.count_nonzero(bad):
                k = int(np.argmax(bad)) // max(1, w * len(vals) // 4)
                self.issue(
                    "write-of-nc-read",
                    ins,
                    int(idx[k]),
                    f"{self.mem.near(int(off[k]))} was read with ld.global.nc by another thread in this launch",
                )
        wr[wd] = g

    def _report_race(self, kind, ins, g, t, other, hit):
        q = int(np.argmax(hit))
        o = int(other[q])
        who = f"thread {o % self.npad}" if o >= 0 else "other threads"
        intra = o >= 0 and (o >> 5) == (int(t[q]) >> 5) or o == WARP_MATES
        self.issue(
            "race" if not intra else "race-intra-warp",
            ins,
            int(t[q]),
            f"{kind} hazard on shared byte {int(g[q]) * self.G % self.sstride} with {who}, no barrier in between",
        )
