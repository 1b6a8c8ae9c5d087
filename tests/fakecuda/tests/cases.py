"""Inputs, numpy references and checks for samples.cu: each case returns ([(kernel, grid, block, args, shared)], check)."""

import numpy as np


def bf16_of(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def f32_of(b):
    return (b.astype(np.uint32) << 16).view(np.float32)


def vec_add(n=10000):
    g = np.random.default_rng(0)
    a = g.random(n, "f4")
    b = g.random(n, "f4")
    c = np.zeros(n, "f4")
    return [("vec_add", (n + 255) // 256, 256, [a, b, c, np.int32(n)], 0)], lambda: np.abs(c - (a + b)).max() == 0


def _reduce(k, n, grid):
    x = np.random.default_rng(1).random(n, "f4")
    o = np.zeros(1, "f4")
    return [(k, grid, 256, [x, o, np.int32(n)], 0)], lambda: abs(o[0] - x.sum(dtype="f8")) <= 1e-5 * n


def reduce_sum(n=100003, grid=40):
    return _reduce("reduce_sum", n, grid)


def reduce_sum_bad(n=100003, grid=40):
    return _reduce("reduce_sum_bad", n, grid)


def affine_ref(r, v, d, gam, lam):
    B, T = r.shape
    A = np.zeros((B, T))
    c = np.zeros(B)
    for t in range(T - 1, -1, -1):
        nd = 1.0 - d[:, t]
        c = r[:, t] + gam * nd * v[:, t + 1] - v[:, t] + gam * lam * nd * c
        A[:, t] = c
    return A


def reverse_affine_scan(B=8, T=700):
    g = np.random.default_rng(2)
    r = g.standard_normal((B, T)).astype("f4")
    v = g.standard_normal((B, T + 1)).astype("f4")
    d = (g.random((B, T)) < 0.02).astype("f4")
    A = np.zeros((B, T), "f4")
    ref = affine_ref(r.astype("f8"), v.astype("f8"), d.astype("f8"), 0.99, 0.95)
    return [
        ("reverse_affine_scan", B, 256, [r, v, d, A, np.int32(T), np.float32(0.99), np.float32(0.95)], 0)
    ], lambda: np.abs(A - ref).max() < 2e-4


def _loss_inputs(n):
    g = np.random.default_rng(3)
    lp = bf16_of(-g.random(n, "f4"))
    lo = bf16_of(-g.random(n, "f4"))
    adv = g.standard_normal(n).astype("f4")
    mask = (g.random(n) < 0.7).astype(np.uint8)
    return lp, lo, adv, mask


def clipped_ratio_bf16(n=65536, grid=16, eps=0.2):
    lp, lo, adv, mask = _loss_inputs(n)
    part = np.zeros(2 * grid, "f4")
    out = np.zeros(2, "f4")
    r = np.exp(f32_of(lp).astype("f8") - f32_of(lo))
    c = np.clip(r, 1 - eps, 1 + eps)
    ref = -(mask * np.minimum(r * adv, c * adv)).sum() / max(mask.sum(), 1)
    return [
        ("clipped_ratio_bf16", grid, 256, [lp, lo, adv, mask, part, out, np.int32(n), np.float32(eps)], 0)
    ], lambda: abs(out[0] - ref) < 1e-5 and out[1] == mask.sum()


def clipped_ratio_backward_bf16(n=65536, eps=0.2):
    lp, lo, adv, mask = _loss_inputs(n)
    gr = np.zeros(n, np.uint16)
    fwd = np.array([0, mask.sum()], "f4")
    r = np.exp(f32_of(lp).astype("f8") - f32_of(lo))
    cl = ((adv > 0) & (r > 1 + eps)) | ((adv < 0) & (r < 1 - eps))
    ref = np.where((mask > 0) & ~cl, -r * adv / max(mask.sum(), 1), 0)
    return [
        ("clipped_ratio_backward_bf16", (n // 2 + 255) // 256, 256, [lp, lo, adv, mask, fwd, gr, np.int32(n), np.float32(eps)], 0)
    ], lambda: np.all(np.abs(f32_of(gr) - ref) <= np.abs(ref) * 2**-8 + 1e-12)


def lookback_scan(n=20000):
    x = np.random.default_rng(4).random(n, "f4")
    y = np.zeros(n, "f4")
    nt = (n + 255) // 256
    st = np.zeros(nt, np.uint64)
    ct = np.zeros(1, np.uint32)
    return [("lookback_scan", nt, 256, [x, y, st, ct, np.int32(n)], 0)], lambda: np.abs(y - np.cumsum(x, dtype="f8")).max() < 1e-6 * n


def half_axpy(n=5000):
    g = np.random.default_rng(5)
    x = g.standard_normal(n).astype("f2")
    y = g.standard_normal(n).astype("f2")
    z = np.zeros(n, "f2")
    c = np.zeros(1, np.int32)
    v = x.astype("f4") * np.float32(1.5) + y.astype("f4")
    return [
        ("half_axpy", (n + 255) // 256, 256, [x, y, z, np.float32(1.5), np.int32(n), c], 0)
    ], lambda: np.abs(z.astype("f4") - v).max() < 4e-3 and c[0] == (v > 0).sum()


def dyn_rev(n=100):
    x = np.arange(n, dtype=np.int32)
    y = np.zeros(n, np.int32)
    return [("dyn_rev", 1, 128, [x, y, np.int32(n)], 512)], lambda: np.array_equal(y, x[::-1])


ALL = [
    vec_add,
    reduce_sum,
    reduce_sum_bad,
    reverse_affine_scan,
    clipped_ratio_bf16,
    clipped_ratio_backward_bf16,
    lookback_scan,
    half_axpy,
    dyn_rev,
]
