"""Read a CUDA fat binary as it lies in the memory of this process: PTX text by architecture, register counts from the cubins."""

import ctypes
import ctypes.util
import struct

PTX, ELF = 1, 2


def _zstd(b, n):
    z = ctypes.CDLL(ctypes.util.find_library("zstd") or "libzstd.so.1")
    z.ZSTD_decompress.restype = ctypes.c_size_t
    z.ZSTD_decompress.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    out = ctypes.create_string_buffer(n)
    got = z.ZSTD_decompress(out, n, b, len(b))
    if got != n:
        raise ValueError("fat binary: zstd data does not decompress")
    return out.raw


def _lz4(b, n):
    out, i = bytearray(), 0
    while i < len(b):
        t = b[i]
        i += 1
        k = t >> 4
        if k == 15:
            while True:
                k += b[i]
                i += 1
                if b[i - 1] != 255:
                    break
        out += b[i : i + k]
        i += k
        if i >= len(b) or len(out) >= n:
            break
        d = b[i] | b[i + 1] << 8
        i += 2
        k = (t & 15) + 4
        if k == 19:
            while True:
                k += b[i]
                i += 1
                if b[i - 1] != 255:
                    break
        for _ in range(k):
            out.append(out[-d])
    return bytes(out[:n])


class Fatbin:
    """``ptx``: {arch: text}, ``elf``: {arch: bytes (lazy)}; arch is 90 for sm_90 / compute_90."""

    def __init__(self, addr):
        self._at = {PTX: {}, ELF: {}}
        magic, _, hs, size = struct.unpack("<IHHQ", ctypes.string_at(addr, 16))
        if magic != 0xBA55ED50:
            raise ValueError(f"no fat binary at {addr:#x}")
        p, end = addr + hs, addr + hs + size
        while p < end:
            kind, _, h, n, cs, _, _, _, arch, _, _, flags, _, dec = struct.unpack("<HHIQIIHHIIIQQQ", ctypes.string_at(p, 64))
            if kind in self._at:
                self._at[kind][arch] = (p + h, cs or n, flags, dec)
            p += h + n
        self._text, self._regs = {}, {}

    def archs(self, kind):
        return sorted(self._at[kind])

    def data(self, kind, arch):
        at, n, flags, dec = self._at[kind][arch]
        b = ctypes.string_at(at, n)
        if flags & 0x8000:
            return _zstd(b, dec)
        if flags & 0x2000:
            return _lz4(b, dec)
        return b

    def best(self, cc):
        return max([a for a in self.archs(PTX) if a <= cc], default=0)

    def ptx(self, cc):
        """PTX text of the newest architecture that a card of compute capability ``cc`` can compile, or None."""
        a = self.best(cc)
        if not a:
            return None
        if a not in self._text:
            self._text[a] = self.data(PTX, a).rstrip(b"\0").decode()
        return self._text[a]

    def registers(self, cc):
        """{kernel: registers per thread} of the cubin that a card of ``cc`` would load, {} when there is none."""
        ok = [a for a in self.archs(ELF) if a // 10 == cc // 10 and a <= cc]
        if not ok:
            return {}
        if max(ok) not in self._regs:
            self._regs[max(ok)] = _regcount(self.data(ELF, max(ok)))
        return self._regs[max(ok)]


def _regcount(e):
    if e[:4] != b"\x7fELF":
        return {}
    (shoff,) = struct.unpack_from("<Q", e, 40)
    num, strx = struct.unpack_from("<HH", e, 60)
    sec = [struct.unpack_from("<IIQQQQIIQQ", e, shoff + 64 * k) for k in range(num)]

    def name(off, tab):
        return e[sec[tab][4] + off : e.index(b"\0", sec[tab][4] + off)].decode()

    by = {name(s[0], strx): s for s in sec}
    if ".symtab" not in by or ".nv.info" not in by:
        return {}
    sym, inf, out = by[".symtab"], by[".nv.info"], {}
    p, end = inf[4], inf[4] + inf[5]
    while p < end:
        fmt, attr, n = struct.unpack_from("<BBH", e, p)
        p += 4
        if fmt == 4:
            if attr == 0x2F:  # EIATTR_REGCOUNT
                k, regs = struct.unpack_from("<II", e, p)
                (off,) = struct.unpack_from("<I", e, sym[4] + 24 * k)
                out[name(off, sym[6])] = regs
            p += n
    return out
