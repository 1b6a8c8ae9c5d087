"""Inputs and tolerances that the tests and ``python -m fused_critic check`` share: layouts, memory layouts, masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LAYOUTS = ("padded", "time-major", "single", "packed")
STRIDES = ("contiguous", "transposed", "row-strided", "misaligned", "every-other")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MASKS = (None, torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float64)
REDUCTIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean", "none")


@dataclass
class Layout:
    """How `num_seqs` sequences are arranged in tensors of `shape`."""

    shape: tuple[int, ...]
    num_seqs: int
    time_dim: int = -1
    cu_seqlens: torch.Tensor | None = None

    @property
    def options(self):
        return {"time_dim": self.time_dim, "cu_seqlens": self.cu_seqlens}


def layout(kind, num_seqs, seq_len, generator, device="cpu"):
    if kind == "padded":
        return Layout((num_seqs, seq_len), num_seqs)
    if kind == "time-major":
        return Layout((seq_len, num_seqs), num_seqs, time_dim=0)
    if kind == "single":
        return Layout((seq_len,), 1)
    tokens = num_seqs * seq_len
    inner = torch.randint(0, tokens + 1, (max(num_seqs - 1, 0),), generator=generator).sort().values
    bounds = torch.cat([torch.tensor([0]), inner, torch.tensor([tokens])])
    dtype = torch.int32 if num_seqs % 2 else torch.int64
    return Layout((tokens,), len(bounds) - 1, cu_seqlens=bounds.to(device, dtype))


def restride(x, how):
    """The same values in other memory."""
    if how == "transposed" and x.dim() == 2:
        return x.t().contiguous().t()
    if how == "row-strided" and x.dim() == 2:
        wide = x.new_zeros(x.shape[0], x.shape[1] + 3)
        wide[:, 3:] = x
        return wide[:, 3:]
    if how == "misaligned":
        flat = x.new_zeros(x.numel() + 1)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(x.shape)
    if how == "every-other":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    return x.contiguous()


FAR = 2**31 + 5


def far_views(device):
    """Small bfloat16 views of one storage that pass 2^31 elements, by what does. On the CPU only the touched pages take memory."""
    storage = torch.empty(FAR + 16, dtype=torch.bfloat16, device=device)
    return {
        "storage offset": storage[FAR : FAR + 12].view(2, 6),
        "row stride": storage.as_strided((2, 6), (FAR, 1)),
        "time stride": storage.as_strided((6, 2), (1, FAR)).t(),
        "stride of a single sequence": storage.as_strided((2,), (FAR,)),
    }


def compare_far(compare, device):
    """The largest of what `compare(view)` returns; its AssertionError, with the view's name."""
    used = []
    for name, view in far_views(device).items():
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(8)))
        try:
            used.append(compare(view))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return max(used)


def mask(shape, dtype, generator, density=0.6):
    """Gaps included; a floating mask is a weight."""
    if dtype is None:
        return None
    valid = torch.rand(shape, generator=generator) < density
    if dtype.is_floating_point:
        return (valid * torch.rand(shape, generator=generator)).to(dtype)
    return valid.to(dtype) if dtype == torch.bool else valid.to(dtype) * 3


# Relative to the largest magnitude of a result, or to 1 where that is less.
FLOAT64_TOLERANCE = 1e-10
FLOAT32_TOLERANCE = 2e-5
WHITEN_TOLERANCE = 1e-5  # float32
STATISTICS_TOLERANCE = 2e-5  # relative and absolute, of each statistic
ROUNDING = {torch.float64: 0.0, torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def tolerance(*dtypes):
    """Of what is computed from these: in float32, or in float64 if one of them is; what is stored in another dtype adds its ROUNDING."""
    return FLOAT64_TOLERANCE if torch.float64 in dtypes else FLOAT32_TOLERANCE


def stored(tol, dtype):
    """The tolerance of what was computed to `tol` and then rounded to `dtype`."""
    return max(tol, ROUNDING[dtype])


def assert_close(got, expected, tol, what=""):
    """The difference as a share of what is allowed; AssertionError where that exceeds 1 (or is NaN)."""
    got, expected = (torch.as_tensor(x, dtype=torch.float64).detach().cpu() for x in (got, expected))
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if got.numel() == 0:
        return 0.0
    scale = max(1.0, float(expected.abs().max()))
    worst = (got - expected).abs().argmax()
    difference = float((got - expected).abs().flatten()[worst])
    assert difference <= tol * scale, (
        f"{what}: differs by {difference:.3g} (allowed {tol * scale:.3g}) at flat index {int(worst)}: "
        f"got {float(got.flatten()[worst]):.9g}, expected {float(expected.flatten()[worst]):.9g}"
    )
    return difference / (tol * scale)


def assert_same_bits(a, b, what=""):
    """Equal bit for bit, NaN included."""
    a, b = a.detach().cpu().contiguous().reshape(-1), b.detach().cpu().contiguous().reshape(-1)
    assert a.dtype == b.dtype and a.shape == b.shape, f"{what}: {a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    different = (a.view(integers) != b.view(integers)).nonzero()
    if len(different):
        first = int(different[0])
        raise AssertionError(
            f"{what}: {len(different)} of {len(a)} elements differ, the first at {first}: {a[first].item()!r} against {b[first].item()!r}"
        )
