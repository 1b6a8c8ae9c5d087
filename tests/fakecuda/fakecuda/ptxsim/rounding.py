"""Floating-point arithmetic that numpy lacks: directed rounding, fused multiply-add, bfloat16."""

import numpy as np

from .values import F16, F32, F64, U16, U32, U64


def f32_to_bf16(x):
    """Round float32 to bf16 (nearest even), as uint16 bits."""
    u = np.ascontiguousarray(x, F32).view(U32)
    r = ((u + U32(0x7FFF) + ((u >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    return np.where((u & U32(0x7FFFFFFF)) > U32(0x7F800000), U16(0x7FFF), r)


def bf16_to_f32(b):
    """bf16 bits (uint16) to float32."""
    return (np.asarray(b).astype(U32) << U32(16)).view(F32)


def to_odd(s, err):
    """Make the double s 'rounded to odd' given the exact residual's sign, so that one more rounding is exact."""
    fix = (err != 0) & np.isfinite(s) & ((s.view(U64) & U64(1)) == 0)
    if fix.any():
        toward = np.where(err > 0, np.inf, -np.inf)
        s = np.where(fix, np.nextafter(s, toward), s)
    return s


def narrow(s, mode):
    """Round double (already odd-rounded or exact) to float32 under rn/rz/rm/rp."""
    f = s.astype(F32)
    if mode == "rn":
        return f
    d = f.astype(F64)
    if mode == "rz":
        bad = np.abs(d) > np.abs(s)
        return np.where(bad, np.nextafter(f, F32(0)), f)
    if mode == "rm":
        return np.where(d > s, np.nextafter(f, F32(-np.inf)), f)
    return np.where(d < s, np.nextafter(f, F32(np.inf)), f)


def to_half(v, mode):
    """float32/64 to float16 under rn/rz/rm/rp."""
    h = v.astype(F16)
    if mode == "rn":
        return h
    d, s = h.astype(F64), v.astype(F64)
    if mode == "rz":
        return np.where(np.abs(d) > np.abs(s), np.nextafter(h, F16(0)), h)
    if mode == "rm":
        return np.where(d > s, np.nextafter(h, F16(-np.inf)), h)
    return np.where(d < s, np.nextafter(h, F16(np.inf)), h)


def two_sum(a, b):
    s = a + b
    bb = s - a
    e = (a - (s - bb)) + (b - bb)
    return s, np.where(np.isfinite(s), e, 0.0)


def fma32(a, b, c, mode="rn"):
    p = a.astype(F64) * b.astype(F64)  # exact
    s, e = two_sum(p, c.astype(F64))
    return narrow(to_odd(s, e), mode)


def addmul32(op, a, b, mode):
    if mode == "rn":
        return a + b if op == "add" else a * b
    if op == "mul":
        return narrow(a.astype(F64) * b.astype(F64), mode)
    s, e = two_sum(a.astype(F64), b.astype(F64))
    return narrow(to_odd(s, e), mode)


def flush(x):
    return np.where(np.abs(x) < F32(1.17549435e-38), np.copysign(F32(0), x), x) if x.dtype == F32 else x


def fminmax(op, a, b, nan):
    f = (np.minimum if op == "min" else np.maximum) if nan else (np.fmin if op == "min" else np.fmax)
    return f(a, b)


def half_add(ty, o, v):
    if ty == "f16":
        return F16(F32(o) + F32(v))
    if ty == "bf16":
        return f32_to_bf16(bf16_to_f32(np.array([o])) + bf16_to_f32(np.array([v])))[0]
    one = "f16" if ty == "f16x2" else "bf16"
    cv = (lambda x: np.array([x], U16).view(F16)[0]) if one == "f16" else (lambda x: U16(x))
    bits = (lambda x: int(np.array([x], F16).view(U16)[0])) if one == "f16" else int
    lo = bits(half_add(one, cv(int(o) & 0xFFFF), cv(int(v) & 0xFFFF)))
    hi = bits(half_add(one, cv(int(o) >> 16), cv(int(v) >> 16)))
    return U32(lo | hi << 16)
