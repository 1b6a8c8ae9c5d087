"""Counts: what a wave adds up, and the report of a launch."""

from collections import Counter, defaultdict

import numpy as np


class Counting:
    """What a Wave counts."""

    def _count(self, ins, sp, off, i, nbytes, write, atomic=False):
        idx = self.all if i is None else i
        if idx is not self.counted[0]:  # mostly the group of the access before
            self.counted = idx, idx >> 5, self._warps(idx)
        _, warp, requests = self.counted
        st = self.rep.mem[ins.pc]
        st["requests"] += requests
        st["bytes"] += idx.size * nbytes
        st["space"], st["write"], st["atomic"], st["width"] = sp, write, atomic, nbytes
        if sp == "global":
            sec = off >> 5
            key = (warp << 44) | sec
            if np.count_nonzero(key[1:] < key[:-1]):
                key.sort()
            st["sectors"] += 1 + int(np.count_nonzero(key[1:] != key[:-1]))
            (self.mem.wr if write else self.mem.rd).add(sec)
        elif sp == "shared":
            # bank conflicts: 8-byte accesses are served per half warp, 16-byte per quarter warp
            words = max(1, nbytes // 4)
            word = off >> 2
            step = word[1:] - word[:-1]
            if not np.count_nonzero(step) or not np.count_nonzero((step != 0) & (step != words)):
                return  # neighbours access the same or adjacent words: never two of one bank
            grp = warp * 4 + (idx & 31) // max(1, 128 // nbytes) if nbytes >= 4 else warp * 4
            g = np.repeat(grp, words)
            wd = (word[:, None] + np.arange(words)).ravel()
            key = np.unique((g << 32) | wd)
            gk, bank = key >> 32, key & 31
            g0 = gk.min()
            cnt = np.bincount((gk - g0) * 32 + bank, minlength=int(gk.max() - g0 + 1) * 32).reshape(-1, 32).max(1)
            st["replays"] += int(np.maximum(cnt - 1, 0).sum())


class Report:
    """Counts of one launch. str() gives a summary, hot() the memory instructions, mix() the opcodes."""

    def __init__(self, E, grid, block, shared):
        self.E, self.kernel, self.grid, self.block = E, E.name, grid, block
        n = len(E.insts)
        self.issued, self.threads = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
        self.skipped = np.zeros(n + 1, np.int64)  # warp instructions run for nobody: the guard held for no thread of the group
        self.branches, self.divergent = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
        self.mem = defaultdict(lambda: dict(requests=0, bytes=0, sectors=0, replays=0, space="", write=False, atomic=False, width=0))
        self.barriers = self.blocks = self.steps = 0
        self.issues = []  # (kind, PTX line, text, count)
        self._iss = {}
        self.wall_s = 0.0
        self.static_shared, self.dynamic_shared = E.shared_bytes, shared
        self.read_sectors = self.write_sectors = 0

    def add_issue(self, kind, ins, text):
        k = (kind, ins.line)
        if k in self._iss:
            self.issues[self._iss[k]][3] += 1
        else:
            self._iss[k] = len(self.issues)
            self.issues.append([kind, ins.line, text, 1])

    def footprint(self, mem):
        self.read_sectors, self.write_sectors = mem.rd.all().size, mem.wr.all().size

    def total(self, space, field, write=None, atomic=None):
        return sum(
            s[field]
            for s in self.mem.values()
            if s["space"] == space and (write is None or s["write"] == write) and (atomic is None or s["atomic"] == atomic)
        )

    @property
    def warp_insts(self):
        return int(self.issued.sum())

    @property
    def thread_insts(self):
        return int(self.threads.sum())

    @property
    def simd_efficiency(self):
        return self.thread_insts / (32.0 * self.warp_insts) if self.warp_insts else 0.0

    def as_dict(self):
        """Flat numbers, for a side-by-side table."""
        gl = dict(write=False, atomic=False)
        gs = dict(write=True, atomic=False)
        ga = dict(atomic=True)

        def eff(b, s):
            return round(b / (32 * s), 3) if s else None

        lb, ls = self.total("global", "bytes", **gl), self.total("global", "sectors", **gl)
        sb, ss = self.total("global", "bytes", **gs), self.total("global", "sectors", **gs)
        return {
            "warp_insts": self.warp_insts,
            "thread_insts": self.thread_insts,
            "simd_eff": round(self.simd_efficiency, 3),
            "branches": int(self.branches.sum()),
            "divergent_branches": int(self.divergent.sum()),
            "gld_requests": self.total("global", "requests", **gl),
            "gld_sectors": ls,
            "gld_bytes": lb,
            "gld_eff": eff(lb, ls),
            "gst_requests": self.total("global", "requests", **gs),
            "gst_sectors": ss,
            "gst_bytes": sb,
            "gst_eff": eff(sb, ss),
            "atomic_requests": self.total("global", "requests", **ga),
            "atomic_threads_bytes": self.total("global", "bytes", **ga),
            "unique_read_bytes": 32 * self.read_sectors,
            "unique_write_bytes": 32 * self.write_sectors,
            "shared_requests": self.total("shared", "requests"),
            "shared_bank_replays": self.total("shared", "replays"),
            "barriers": self.barriers,
            "shared_bytes": self.static_shared + self.dynamic_shared,
            "issues": len(self.issues),
            "sim_s": round(self.wall_s, 3),
        }

    def bound(self, bw_gbs=3350.0, sms=132, ghz=1.7, l2_gbs=5500.0):
        """Lower bounds in microseconds for a GPU: DRAM (distinct sectors), L2 (all sectors), issue (4 warp
        instructions per SM and cycle). Defaults are of H100-SXM class; not a prediction."""
        d = self.as_dict()
        dram = (d["unique_read_bytes"] + d["unique_write_bytes"]) / bw_gbs / 1e3
        l2 = 32 * (d["gld_sectors"] + d["gst_sectors"]) / l2_gbs / 1e3
        issue = self.warp_insts / (4.0 * sms * ghz * 1e3)
        return {"dram_us": round(dram, 3), "l2_us": round(l2, 3), "issue_us": round(issue, 3), "max_us": round(max(dram, l2, issue), 3)}

    def mix(self):
        c = Counter()
        for k, ins in enumerate(self.E.insts):
            if self.issued[k]:
                c[".".join([ins.op] + ins.mods)] += int(self.issued[k])
        return c.most_common()

    def hot(self, n=12):
        rows = []
        for pc, s in self.mem.items():
            ins = self.E.insts[pc]
            eff = s["bytes"] / (32 * s["sectors"]) if s["sectors"] else None
            rows.append(
                (
                    s["sectors"] or s["requests"] + s["replays"],
                    f"PTX {ins.line:5d} {ins.loc or '':24s} {s['space']:6s} {'atom' if s['atomic'] else 'st' if s['write'] else 'ld':4s} "
                    f"{s['width']:2d}B req={s['requests']:<8d} sectors={s['sectors']:<8d} "
                    f"sect/req={s['sectors'] / s['requests']:.2f} eff={'-' if eff is None else format(eff, '.2f')} "
                    f"replays={s['replays']}  {ins.text}",
                )
            )
        return "\n".join(r for _, r in sorted(rows, key=lambda r: -r[0])[:n])

    def __str__(self):
        d = self.as_dict()
        s = f"{self.kernel} <<<{self.grid}, {self.block}>>>  " + "  ".join(f"{k}={v}" for k, v in d.items())
        for kind, line, text, cnt in self.issues:
            s += f"\n  ISSUE {kind} x{cnt}: {text}"
        return s
