"""The sample extension works as on a GPU. Run on each card by test_sessions.py."""

import os
import subprocess
import sys
import threading

import fakecuda
import pytest
import torch
from fakecuda import engine

SAMPLE = os.environ["SAMPLE"]
torch.ops.load_library(SAMPLE)
ops = torch.ops.sample


@pytest.mark.parametrize("n", [0, 1, 255, 256, 1000])
def test_parameters_by_value(n):
    a, b = torch.randn(n), torch.randn(n)
    out = ops.add(a.cuda(), b.cuda(), 0.5)
    assert out.is_cuda
    torch.testing.assert_close(out.cpu(), a + 0.5 * b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 1023, 1025, 20000])
def test_last_block_adds_up(n, dtype):
    x = torch.randn(n).to(dtype)
    got = ops.sum(x.cuda())
    torch.testing.assert_close(got.cpu(), x.float().sum(), rtol=1e-4, atol=1e-3)
    assert fakecuda.launches()[-1]["grid"][0] == (n + 1023) // 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (2, 300), (0, 5)])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan(shape, dtype, reverse):
    x = torch.randn(shape).to(dtype)
    y = ops.scan(x.cuda(), reverse).cpu().float()
    ref = x.float().flip(1).cumsum(1).flip(1) if reverse else x.float().cumsum(1)
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y, ref, **tolerance)


def test_blocks_that_wait_for_one_another():
    x = torch.randint(0, 9, (1000,)).float()
    torch.testing.assert_close(ops.chained_scan(x.cuda()).cpu(), x.cumsum(0))


def test_noncontiguous_input():
    x = torch.randn(40, 30)
    torch.testing.assert_close(ops.scan(x.cuda().t(), True).cpu(), x.t().flip(1).cumsum(1).flip(1))


def test_autograd():
    x = torch.randn(3, 50)
    g = x.cuda().requires_grad_()
    w = torch.randn(3, 50)
    (ops.scan(g, True) * w.cuda()).sum().backward()
    c = x.clone().requires_grad_()
    (c.flip(1).cumsum(1).flip(1) * w).sum().backward()
    torch.testing.assert_close(g.grad.cpu(), c.grad)
    assert "scan_kernel<float, false>" in fakecuda.launches()[-1]["kernel"]


def test_opcheck():
    torch.library.opcheck(ops.scan.default, (torch.randn(2, 9).cuda().requires_grad_(), True))


def test_checks_raise():
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        ops.scan(torch.zeros(2, 2, dtype=torch.int32).cuda(), True)
    with pytest.raises(NotImplementedError):
        ops.scan(torch.zeros(2, 2), True)  # no CPU kernel


def test_side_stream_and_events():
    x = torch.randn(1, 100).cuda()
    s = torch.cuda.Stream()
    s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        y = ops.scan(x, False)
    assert fakecuda.launches()[-1]["stream"] == s.cuda_stream != 0
    y.record_stream(torch.cuda.current_stream())
    torch.cuda.current_stream().wait_stream(s)
    torch.cuda.synchronize()
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record(), b.record()
    assert a.elapsed_time(b) >= 0
    torch.testing.assert_close(y.cpu(), x.cpu().cumsum(1))


def test_device_guard():
    x = torch.randn(1, 100).to("cuda:1")
    assert torch.cuda.current_device() == 0
    y = ops.scan(x, False)
    assert y.device == torch.device("cuda:1") and fakecuda.launches()[-1]["device"] == 1 and torch.cuda.current_device() == 0
    torch.testing.assert_close(y.cpu(), x.cpu().cumsum(1))
    with torch.cuda.device(1), torch.cuda.stream(torch.cuda.Stream(1)):
        ops.scan(x, False)


def test_pinned_memory():
    x = torch.randn(1, 33).pin_memory()
    assert x.is_pinned()
    y = ops.scan(x.to("cuda", non_blocking=True), False).to("cpu", non_blocking=True)
    torch.cuda.synchronize()
    torch.testing.assert_close(y, x.cumsum(1))


def test_threads():
    x, out = torch.randn(4, 64), [None] * 4

    def work(k):
        with torch.cuda.stream(torch.cuda.Stream()):
            out[k] = ops.scan(x.cuda() + k, True).cpu()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for k in range(4):
        torch.testing.assert_close(out[k], (x + k).flip(1).cumsum(1).flip(1))


def test_host_dereference_of_device_pointer_dies():
    program = f"import torch; torch.ops.load_library({SAMPLE!r}); torch.ops.sample.peek(torch.zeros(4).cuda())"
    assert subprocess.run([sys.executable, "-c", program]).returncode == -11


def test_out_of_memory():
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(100 << 30, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("n", [3, 40 << 20])
def test_new_memory_is_poisoned(n):
    for _ in range(4):  # in the end where an earlier one was
        x = torch.empty(n, device="cuda")
        values = x[:: max(n // 1000, 1)]
        assert values.isnan().all() and x[-1].isnan()
        values.zero_()
        assert values.eq(0).all() and (values.numel() == n or x[1].isnan())
        del x, values


def test_limits_of_kernels():
    (sums,) = [v for k, v in engine.images().items() if "sum_kernel<float>" in k]
    assert sums["max_threads"] == 256 and sums["static_shared"] >= 33
    if torch.cuda.get_device_capability() == (9, 0):
        assert sums["registers"] > 0
