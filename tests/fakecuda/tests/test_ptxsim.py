"""Kernels compiled to PTX, run by ptxsim and compared with numpy. Needs nvcc."""

from fractions import Fraction
from math import erf
from pathlib import Path

import cases
import numpy as np
import pytest
from fakecuda import ptxsim


@pytest.fixture(params=["sm_80", "sm_90"])
def arch(request):
    return request.param


@pytest.fixture
def samples(ptx, arch):
    return ptx("samples.cu", arch)


@pytest.fixture
def features(ptx, arch):
    return ptx("features.cu", arch)


SAMPLES = Path(__file__).with_name("samples.cu")
rng = np.random.default_rng(7)


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("case", cases.ALL, ids=lambda c: c.__name__)
def test_samples(case, seed, samples):
    launches, check = case()
    for k, g, b, a, s in launches:
        rep = samples.launch(k, g, b, a, s, seed=seed)
        assert rep.issues == []
    assert check()


def test_big_rows_small_resident(samples):
    launches, check = cases.reverse_affine_scan(B=33, T=1025)
    k, g, b, a, s = launches[0]
    samples.launch(k, g, b, a, s, resident=512)
    assert check()


def _trunc_div(a, b):
    q = np.abs(a.astype(object)) // np.abs(b.astype(object))
    return np.array([int(x) if (int(p) < 0) == (int(r) < 0) else -int(x) for x, p, r in zip(q, a, b)], dtype=object)


def _u(x, bits):
    return [int(v) & ((1 << bits) - 1) for v in x]


def _s(x, bits):
    return [((int(v) & ((1 << bits) - 1)) ^ (1 << (bits - 1))) - (1 << (bits - 1)) for v in x]


def test_int(features):
    n = 300
    a = rng.integers(-(2**31), 2**31, n).astype(np.int32)
    b = rng.integers(-(2**31), 2**31, n).astype(np.int32)
    b[:50] = rng.integers(1, 40, 50)
    a[:5] = [0, -1, 1, 2**31 - 1, 5]
    o = np.zeros(n * 24, np.int32)
    features.launch("k_int", (n + 127) // 128, 128, [a, b, o, np.int32(n)])
    o = o.reshape(n, 24).T
    q = _trunc_div(a, b)
    ua, ub = np.array(_u(a, 32), object), np.array(_u(b, 32), object)
    ref = {
        0: q,
        1: a.astype(object) - q * b.astype(object),
        2: ua // ub,
        3: ua % ub,
        4: [bin(x).count("1") for x in ua],
        5: [32 - int(x).bit_length() for x in ua],
        6: [int(f"{x:032b}"[::-1], 2) for x in ua],
        7: [(int(x) & -int(x)).bit_length() for x in ua],
        8: [(x & 0xFFFF) | ((y & 0xFFFF) << 16) for x, y in zip(ua, ub)],
        9: [(((y << 32) | x) << 7 >> 32) for x, y in zip(ua, ub)],
        10: [(((y << 32) | x) >> (y & 31)) for x, y in zip(ua, ub)],
        11: (a.astype(object) * b.astype(object)) >> 32,
        12: (ua * ub) >> 32,
        13: np.minimum(a, b),
        14: [max(x, y) for x, y in zip(ua, ub)],
        15: np.abs(a.astype(object)),
        16: [int(x) >> (y & 31) for x, y in zip(a, ub)],
        17: [x >> (y & 31) for x, y in zip(ua, ub)],
        18: [x << (y & 31) for x, y in zip(ua, ub)],
        19: np.maximum(a, b),
        20: [abs(int(x) - int(y)) + 3 for x, y in zip(a, b)],
        21: (a.astype(object) * b.astype(object)) >> 13,
        22: [(x & 0xFF) ^ (y | 0xF0) for x, y in zip(ua, ub)],
        23: ~a,
    }
    for k, r in ref.items():
        assert _s(r, 32) == [int(x) for x in o[k]], k


def test_i64(features):
    n = 200
    a = rng.integers(-(2**63), 2**63 - 1, n)
    b = rng.integers(-(2**63), 2**63 - 1, n)
    b[:60] = rng.integers(1, 1000, 60)
    b[60:80] = -7
    o = np.zeros(n * 10, np.int64)
    features.launch("k_i64", 2, 128, [a, b, o, np.int32(n)])
    o = o.reshape(n, 10).T
    q = _trunc_div(a, b)
    ua, ub = np.array(_u(a, 64), object), np.array(_u(b, 64), object)
    oa, ob = a.astype(object), b.astype(object)
    ref = {
        0: q,
        1: oa - q * ob,
        2: oa * ob,
        3: ua // ub,
        4: [bin(x).count("1") for x in ua],
        5: [64 - int(x).bit_length() for x in ua],
        6: [x >> (y & 63) for x, y in zip(oa, ub)],
        7: [x >> (y & 63) for x, y in zip(ua, ub)],
        8: (oa * ob) >> 64,
        9: np.minimum(a, b),
    }
    for k, r in ref.items():
        assert _s(r, 64) == [int(x) for x in o[k]], k


def _ulp(a, b):
    def f(x):
        return np.where(x.view(np.int32) < 0, np.int64(-(2**31)) - x.view(np.int32), x.view(np.int32)).astype(np.int64)

    return np.abs(f(np.ascontiguousarray(a, np.float32)) - f(np.ascontiguousarray(b, np.float32)))


def test_f32(features):

    n = 500
    a, b, c = [(rng.standard_normal(n) * 10.0 ** rng.integers(-3, 2, n)).astype("f4") for _ in range(3)]
    c[:100] = -(a * b)[:100]  # cancellation: fused vs unfused matters
    o = np.zeros(n * 24, "f4")
    features.launch("k_f32", 4, 128, [a, b, c, o, np.int32(n)])
    o = o.reshape(n, 24).T
    x, y = a.astype("f8"), b.astype("f8")
    ex = [Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r)) for p, q, r in zip(a, b, c)]
    near = np.array([np.float32(float(e)) for e in ex])
    assert np.array_equal(o[0], near)
    for v, e in zip(o[12], ex):  # round down: v <= exact < next(v)
        assert Fraction(float(v)) <= e < Fraction(float(np.nextafter(v, np.float32(np.inf))))
    for v, e in zip(o[13], [Fraction(float(p)) + Fraction(float(q)) for p, q in zip(a, b)]):
        assert abs(Fraction(float(v))) <= abs(e) < abs(Fraction(float(np.nextafter(v, np.float32(np.copysign(np.inf, v if v else 1))))))
    for v, e in zip(o[14], [Fraction(float(p)) * Fraction(float(q)) for p, q in zip(a, b)]):
        assert Fraction(float(np.nextafter(v, np.float32(-np.inf)))) < e <= Fraction(float(v))
    exact = {
        1: a / b,
        2: np.sqrt(np.abs(a)),
        7: np.fmin(a, b),
        8: np.fmax(a, b),
        9: np.floor(a),
        10: np.rint(a),
        11: np.trunc(a),
        17: np.copysign(a, b),
        22: np.clip(a, 0, 1),
    }
    for k, r in exact.items():
        assert np.array_equal(o[k], r), k

    approx = {
        3: np.exp(x),
        4: np.log(np.abs(x)),
        5: np.exp(x),
        6: np.tanh(x),
        15: x / y,
        16: 1 / np.sqrt(np.abs(x)),
        18: np.log1p(np.abs(x)),
        19: np.expm1(x),
        20: np.sin(x),
        21: np.abs(x) ** y,
        23: np.array([erf(v) for v in x]),
    }
    for k, r in approx.items():
        ok = (np.abs(r) < 3e38) & ((np.abs(r) > 1e-37) | (r == 0))
        assert np.all(~ok | (np.abs(o[k] - r) <= 2e-5 * np.abs(r) + (2e-6 if k in (4, 20) else 1e-30))), k
    assert _ulp(o[3], np.exp(x)).max() <= 3


def test_cvt(features):
    n = 400
    a = (rng.standard_normal(n) * 10.0 ** rng.integers(-2, 4, n)).astype("f4")
    a[:8] = [0.5, 1.5, -0.5, -2.5, 3e9, -3e9, np.nan, np.inf]
    o = np.zeros(n * 12, np.int32)
    features.launch("k_cvt", 4, 128, [a, o, np.int32(n)])
    o = o.reshape(n, 12).T

    def sat(v, lo, hi):
        return np.where(np.isnan(a), 0, np.clip(v.astype("f8"), lo, hi))

    i32 = (-(2.0**31), 2.0**31 - 1)
    for k, f in ((0, np.trunc), (1, np.rint), (2, np.floor), (3, np.ceil)):
        assert np.array_equal(o[k], sat(f(a.astype("f8")), *i32).astype(np.int64)), k
    assert np.array_equal(o[4].view(np.uint32), sat(np.trunc(a.astype("f8")), 0, 2.0**32 - 1).astype(np.int64))
    g = np.isfinite(a)
    with np.errstate(all="ignore"):
        assert np.array_equal(o[7][g], a.astype("f2").view(np.uint16)[g])
        assert np.array_equal(o[8][g], ptxsim.f32_to_bf16(a)[g])
        assert np.array_equal(o[11].view("f4")[g], (a.astype("f8") * 3.0).astype("f4")[g])
        rz = o[9].view("f4")
        fin = g & (np.abs(a) < 6e4)
        h = a.astype("f2")
        h = np.where(np.abs(h.astype("f8")) > np.abs(a.astype("f8")), np.nextafter(h, np.float16(0)), h)
        assert np.array_equal(rz[fin], h.astype("f4")[fin])


def test_half2_bf162(features):
    n = 200
    h = [rng.standard_normal(2 * n).astype("f2") for _ in range(2)]
    b = [ptxsim.f32_to_bf16(rng.standard_normal(2 * n).astype("f4")) for _ in range(2)]
    o, q = np.zeros(6 * n, "f2"), np.zeros(6 * n, np.uint16)
    features.launch("k_half2", 2, 128, [h[0], h[1], o, b[0], b[1], q, np.int32(n)])
    x, y = [v.astype("f8").reshape(n, 2) for v in h]
    o = o.reshape(n, 3, 2)
    for k, r in enumerate((x + y, x * y, x * y + x)):
        assert np.array_equal(o[:, k], r.astype("f2")), k
    x, y = [ptxsim.bf16_to_f32(v).astype("f8").reshape(n, 2) for v in b]
    q = q.reshape(n, 3, 2)
    for k, r in enumerate((x + y, x * y, x * y + x)):
        assert np.array_equal(q[:, k], ptxsim.f32_to_bf16(r.astype("f4").ravel()).reshape(n, 2)), k


@pytest.mark.parametrize("seed", [None, 3])
def test_atomics(seed, features):
    n = 1000
    a = rng.integers(-1000, 1000, n).astype(np.int32)
    o = np.zeros(13, np.int32)
    o[1], o[2], o[4] = 2**31 - 1, -(2**31), -1
    f, u = np.zeros(1, "f4"), np.zeros(1, np.uint64)
    features.launch("k_atom", 8, 128, [a, o, f, u, np.int32(n)], seed=seed)
    assert o[0] == a.sum() and o[1] == a.min() and o[2] == a.max() and o[3] == np.bitwise_or.reduce(a) and o[4] == np.bitwise_and.reduce(a)
    assert o[5] == np.bitwise_xor.reduce(a) and o[6] == n % 10 and o[7] == 2 * n and o[8] == 77 and f[0] == n / 2
    assert u[0] == a.view(np.uint32).astype(np.uint64).sum() and list(o[9:]) == list(np.bincount(a & 3, minlength=4))


def bits(flags):
    return sum(1 << k for k in range(32) if flags[k])


def test_warp(features):
    n = 256
    a = rng.integers(0, 8, n).astype(np.int32)
    o = np.zeros(n * 8, np.int32)
    features.launch("k_warp", 2, 128, [a, o, np.int32(n)])
    o = o.reshape(n, 8)
    for i in range(n):
        w = a[i & ~31 : (i & ~31) + 32]
        lane = i & 31
        exp = [
            bits(w & 1),
            int((w == 3).any()),
            int((w >= 0).all()),
            bits((w & 3) == (w[lane] & 3)),
            w[lane ^ 5],
            w[(lane & ~7) + 2],
            w.sum(),
            w[lane + 3] if (lane & 15) + 3 < 16 else w[lane],
        ]
        assert _u(exp, 32) == _u(o[i], 32), i


@pytest.mark.parametrize("seed", [None, 5])
def test_diverge_switch(seed, features):
    n = 256
    a = rng.integers(-50, 5000, n).astype(np.int32)
    o = np.zeros(n, np.int32)
    rep = features.launch("k_diverge", 2, 128, [a, o, np.int32(n)], seed=seed)
    r = []
    for x in a.tolist():
        v = 0
        for k in range(x & 15):
            v = v + k * x if (k ^ x) & 1 else v - k
            if v > 100000:
                break
        c = x & 7
        v = [v + 1, v * 3, v ^ 0x55, v - 9, -v, v << 1, v | 8, v & 0xFFFF][c]
        r.append(v)
    e = [r[i] + r[i ^ 1] if i & 16 else r[i] - r[i ^ 1] for i in range(n)]
    assert _s(e, 32) == o.tolist() and rep.issues == []
    assert rep.simd_efficiency < 0.9 and rep.divergent.sum() > 0


def test_local_count_struct_generic_cg_cpasync(features):
    m = features
    n = 200
    a = rng.integers(0, 100, n).astype(np.int32)
    o = np.zeros(n, np.int32)
    m.launch("k_local", 2, 128, [a, o, np.int32(n)])
    e = []
    for x in a.tolist():
        b = [x * k for k in range(32)]
        j = x & 31
        s = 0
        for k in range(8):
            s += b[(j + k * 5) & 31]
            b[(j * 3 + k) & 31] = s
        e.append(s)
    assert o.tolist() == e
    a = rng.integers(-5, 6, n).astype(np.int32)
    o = np.zeros(4, np.int32)
    m.launch("k_cnt", 2, 128, [a, o, np.int32(n)])
    assert o[0] == (a[:128] > 0).sum() and o[2] == (a[128:] > 0).sum() and bool(o[1]) == (a[:128] == 5).any()
    x = rng.standard_normal(n).astype("f4")
    o = np.zeros(n, "f8")
    f = np.array([0.5, -1.25, 3.0], "f4")
    m.launch("k_struct", 2, (16, 8), [[np.int32(n), np.float32(1.5), x, *f], o])
    i = np.arange(n)
    ct = np.array([1, 2.5, -3, 0.125])
    assert np.allclose(o, x.astype("f8") * 1.5 + ct[i & 3] + f[i % 3], rtol=0, atol=1e-6)
    x = rng.standard_normal(256).astype("f4")
    o = np.zeros(32, "f4")
    m.launch("k_cg", 2, 128, [x, o, np.int32(256)])
    assert np.allclose(o, x.reshape(32, 8).sum(1), atol=1e-5)
    g = np.arange(64, dtype=np.int32) * 7
    o = np.zeros(64, np.int32)
    m.launch("k_generic", 1, 64, [g, o, np.int32(64)])
    t = np.arange(64)
    assert np.array_equal(o, np.where(t & 1, g[t ^ 2], (t ^ 2) * 10))
    x = rng.standard_normal(4 * 300).astype("f4")
    o = np.zeros_like(x)
    m.launch("k_cpasync", 3, 128, [x, o, np.int32(300)])
    assert np.array_equal(o, x)


def test_detects_faults(features, samples):
    m, s = features, samples
    x, y = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    r = s.launch("racy", 1, 128, [x, y, np.int32(128)])
    assert any(k == "race" for k, *_ in r.issues)
    with pytest.raises(ptxsim.MemoryFault, match="byte 400 of buffer"):
        s.launch("oob", 1, 128, [x[:100].copy(), y, np.int32(100)])
    with pytest.raises(ptxsim.MemoryFault, match="misaligned 8-byte"):
        m.launch("k_misalign", 1, 32, [np.zeros(128, "f4"), np.zeros(32, "f4")])
    with pytest.raises(ptxsim.DeadlockError):
        m.launch("k_dead", 1, 64, [np.zeros(1, np.int32)], max_steps=3000)
    with pytest.raises(ptxsim.DeadlockError, match="barrier"):
        m.launch("k_div_bar", 1, 64, [np.zeros(64, np.int32)])
    r = m.launch("k_badmask", 1, 32, [np.zeros(32, np.int32)])
    assert any(k == "shuffle" for k, *_ in r.issues)
    r = m.launch("k_uninit", 1, 64, [np.zeros(64, np.int32)])
    assert any(k == "uninit" for k, *_ in r.issues)
    r = m.launch("k_nosyncwarp", 1, 32, [x, y])
    assert any(k == "race-intra-warp" for k, *_ in r.issues)


def test_global_hazards(features):
    m = features
    x = np.zeros(128, "f4")
    r = m.launch("k_ncwrite", 1, 64, [x, x, np.int32(64)])
    assert any(k == "nc-read-of-written" for k, *_ in r.issues)
    assert m.launch("k_ncwrite", 1, 64, [np.zeros(128, "f4"), x, np.int32(64)]).issues == []
    assert any(k == "global-write-write" for k, *_ in m.launch("k_gww", 2, 32, [np.zeros(32, np.int32)]).issues)
    assert any(k == "global-write-write" for k, *_ in m.launch("k_gww1", 1, 32, [np.zeros(32, np.int32)]).issues)
    assert m.launch("k_gww", 1, 32, [np.zeros(32, np.int32)]).issues == []


def test_statistics(features, samples):
    m, s = features, samples
    x = np.zeros(1024, "f4")
    o = np.zeros(1024, "f4")
    r = m.launch("k_bank", 1, 32, [x, o])
    d = r.as_dict()
    assert r.issues == []
    assert d["shared_bank_replays"] == 32 * 31  # column reads: 32-way conflict each
    assert d["gld_eff"] == 1.0 and d["gst_eff"] == 0.125 and d["gst_sectors"] == 32 * 32
    for f, eff in ((cases.reduce_sum, 1.0), (cases.reduce_sum_bad, 0.125)):
        ((k, g, b, a, sh),) = f(n=1 << 18, grid=64)[0]
        assert abs(s.launch(k, g, b, a, sh).as_dict()["gld_eff"] - eff) < 1e-6


def test_limits_and_lines(samples):
    assert samples.limits("reduce_sum") == {"static_shared": 128, "max_threads": 256, "min_blocks_per_sm": None}
    assert samples.limits("reduce_sum")["static_shared"] == samples.entry("reduce_sum").shared_bytes
    in_code = samples.code_lines()
    reached = {ins.loc for name in samples.names for ins in samples.entry(name).insts if ins.loc}
    assert reached == in_code and any(line.endswith(f"samples.cu:{number_of('y[i] = x[i]')}") for line in in_code)


def number_of(text):
    return next(n for n, line in enumerate(SAMPLES.read_text().splitlines(), 1) if text in line)


def test_predicated_off_instructions_did_not_run():
    text = """
    .version 8.0
    .target sm_80
    .visible .entry k(.param .u64 k_param_0) {
      .reg .pred %p<2>;
      .reg .b32 %r<3>;
      .reg .b64 %rd<2>;
      ld.param.u64 %rd1, [k_param_0];
      mov.u32 %r1, %tid.x;
      setp.gt.u32 %p1, %r1, 99;
      @%p1 st.global.u32 [%rd1], %r1;
      ret;
    }"""
    out = np.zeros(1, np.int32)
    report = ptxsim.Module(text).launch("k", 1, 32, [out])
    assert (report.issued - report.skipped).tolist()[:5] == [1, 1, 1, 0, 1] and out[0] == 0
    assert ptxsim.Module(text).launch("k", 1, 128, [out], wave_order=[0]).skipped.sum() == 0 and out[0] in range(100, 128)


def test_parameter_read_through_its_address():
    text = """
    .version 8.0
    .target sm_80
    .visible .entry k(.param .align 8 .b8 k_param_0[16], .param .u64 k_param_1) {
      .reg .b32 %r<3>;
      .reg .b64 %rd<4>;
      mov.b64 %rd1, k_param_0;
      ld.param.u64 %rd2, [k_param_1];
      ld.param.u32 %r1, [%rd1+12];
      st.global.u32 [%rd2], %r1;
      mov.b64 %rd3, k_param_0+4;
      ld.param.u32 %r2, [%rd3];
      st.global.u32 [%rd2+4], %r2;
      ret;
    }"""
    out = np.zeros(2, np.int32)
    ptxsim.Module(text).launch("k", 1, 1, [[np.int32(k) for k in (10, 11, 12, 13)], out])
    assert out.tolist() == [13, 11]


def test_kernels_are_parsed_one_by_one():
    text = """
    .version 8.0
    .target sm_80
    .visible .entry odd() { .reg .f99 %x; ret; }
    .visible .entry even() { ret; }"""
    module = ptxsim.Module(text)
    assert module.names == ["odd", "even"]
    module.launch("even", 1, 32, [])
    for _ in range(2):
        with pytest.raises(ptxsim.Unsupported, match="f99"):
            module.entry("odd")
    with pytest.raises(KeyError):
        module.entry("none")


def test_code_follows_the_addresses_of_variables():
    text = """
    .version 8.0
    .target sm_80
    .visible .global .align 4 .u32 v = 5;
    .visible .entry k(.param .u64 k_param_0) {
      .reg .b32 %r<2>;
      .reg .b64 %rd<2>;
      ld.param.u64 %rd1, [k_param_0];
      ld.global.u32 %r1, [v];
      st.global.u32 [%rd1], %r1;
      ret;
    }"""
    module = ptxsim.Module(text)
    base, memory = 1 << 20, np.zeros(4096, np.uint8)
    memory.view(np.int32)[[0, 512]] = 7, 8
    for variable, value in ((0, 7), (2048, 8)):
        arena = ptxsim.HostArena(base, memory, [(0, 4, "a"), (1024, 4, "out"), (2048, 4, "b")])
        module.launch_raw("k", 1, 1, np.uint64(base + 1024).tobytes(), arena, {"v": base + variable})
        assert memory.view(np.int32)[256] == value
