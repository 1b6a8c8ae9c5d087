"""Global memory."""

import numpy as np

from .values import GLOBAL_BASE, U8, UINT, align

SECTOR = 32  # bytes
CHUNK_BITS = 12


class Sectors:
    """A set of sectors of a memory of ``size`` bytes. Takes time and memory by what is in it, not by ``size``."""

    def __init__(self, size):
        n = size // SECTOR + 1
        self.bits = np.zeros(n, np.bool_)
        self.chunks = np.zeros((n >> CHUNK_BITS) + 1, np.bool_)

    def add(self, sectors):
        self.bits[sectors] = True
        self.chunks[sectors >> CHUNK_BITS] = True

    def all(self):
        """Its sectors in ascending order."""
        starts = np.flatnonzero(self.chunks) << CHUNK_BITS
        return np.concatenate([np.zeros(0, np.int64), *(s + np.flatnonzero(self.bits[s : s + (1 << CHUNK_BITS)]) for s in starts)])


class Arena:
    """Device global memory: all buffers in one byte array, 512-byte aligned with guard gaps."""

    base = GLOBAL_BASE

    def __init__(self):
        self.items, self.top = [], 512

    def add(self, arr, name):
        off = self.top
        self.items.append((off, arr, name))
        self.top = align(off + arr.size, 512) + 512
        return GLOBAL_BASE + off

    def freeze(self):
        self.mem = np.zeros(align(self.top, 512), U8)
        for off, a, _ in self.items:
            self.mem[off : off + a.size] = a
        self._index()

    def _index(self):
        self.views = {k: self.mem.view(UINT[k]) for k in (1, 2, 4, 8)}
        self.starts = np.array([o for o, _, _ in self.items] or [0], np.int64)
        self.recent = 0, 0  # bounds of the buffer that was accessed last
        self.ends = np.array([o + a.size for o, a, _ in self.items] or [0], np.int64)
        # Per 4 bytes the last thread that wrote it plainly / read it with .nc, from 1 on. Zeros cost no memory until they are touched.
        self.writer, self.ncreader = (np.zeros(self.mem.size // 4, np.int64) for _ in range(2))
        self.rd, self.wr = Sectors(self.mem.size), Sectors(self.mem.size)

    def writeback(self):
        for off, a, _ in self.items:
            if a.size and a.flags.writeable:
                a[...] = self.mem[off : off + a.size]

    def bad(self, off, width):
        """Index of the first out-of-bounds access or -1."""
        low, high = off.min(), off.max() + width
        if self.recent[0] <= low and high <= self.recent[1]:
            return -1
        k = np.searchsorted(self.starts, low, side="right") - 1
        if k >= 0 and high <= self.ends[k]:
            self.recent = self.starts[k], self.ends[k]
            return -1
        k = np.searchsorted(self.starts, off, side="right") - 1
        ok = (k >= 0) & (off + width <= self.ends[np.maximum(k, 0)])
        return -1 if ok.all() else int(np.argmin(ok))

    def near(self, off):
        k = int(np.searchsorted(self.starts, off, side="right") - 1)
        if k < 0 or not self.items:
            return "no buffer (null or wild pointer)"
        o, a, nm = self.items[k]
        return f"byte {off - o} of buffer {nm!r} ({a.size} bytes)"


class HostArena(Arena):
    """Device memory that already exists: ``buf`` (uint8, a multiple of 8 bytes) holds the bytes from device address ``base``
    on, ``items`` are its allocations (offset, bytes, name), sorted. Nothing is copied; pointers mean what they say."""

    def __init__(self, base, buf, items):
        self.base, self.mem = base, buf
        self.items = [(o, buf[o : o + n], nm) for o, n, nm in items]
        self._index()

    def writeback(self):
        pass
