"""Every kind of finding, provoked. Run on one H100 with the sample extension, by test_sessions.py."""

import ctypes
import os
import re

import fakecuda
import pytest
import torch
from fakecuda import engine

torch.ops.load_library(os.environ["SAMPLE"])
ops = torch.ops.sample
runtime = ctypes.CDLL(None)


def found(kind):
    (issue,) = [i for i in fakecuda.issues() if i["kind"] == kind][-1:]
    return issue["text"]


def expect(kinds, **options):
    return pytest.mark.fakecuda(expect=kinds, **options)


@expect("out-of-bounds")
def test_out_of_bounds():
    x = fakecuda.name(torch.randn(100).cuda(), "x")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ops.fault(x, "out_of_bounds")
    text = found("out-of-bounds")
    assert "byte 400 of buffer x (400 bytes; param 0+0)" in text and "kernels.cu:" in text and "thread (99,0,0)" in text


@expect("out-of-bounds")
def test_freed_memory():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ops.dangling(torch.randn(64).cuda())
    assert "already freed" in found("out-of-bounds")


@expect("out-of-bounds")
def test_missing_device_guard():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ops.unguarded(torch.randn(8).to("cuda:1"), 8)
    assert "of device 1 while the kernel runs on device 0" in found("out-of-bounds")


@expect("out-of-bounds")
def test_host_pointer():
    x, y = torch.zeros(32), torch.zeros(32).cuda()
    runtime_fault = ctypes.CDLL(os.environ["SAMPLE"]).fault
    arguments = [b"asserts_nothing", ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), 32, None]
    assert runtime_fault(*arguments) == engine.ERR["Illegal"]
    assert "null, host or wild pointer" in found("out-of-bounds")


@expect("misaligned")
def test_misaligned():
    with pytest.raises(RuntimeError, match="misaligned address"):
        ops.fault(torch.randn(64).cuda(), "misaligned")


HAZARDS = [
    ("race", "race", 256, "hazard on shared byte"),
    ("race_in_warp", "race-intra-warp", 32, "hazard on shared byte"),
    ("uninitialised", "uninit", 64, "shared byte 252 that was never written"),
    ("wrong_mask", "membermask", 32, "not in its own member mask"),
    ("absent_lane", "shuffle", 32, "which does not execute it"),
    ("two_barriers", "barrier", 64, "different bar.sync instructions"),
    ("blocks_disagree", "global-write-write", 32, "was written by another block with another value"),
    ("threads_disagree", "global-write-write", 32, "in one instruction, with different values"),
    ("read_only_path", "nc-read-of-written", 64, "which another thread wrote in this launch"),
    ("write_after_read_only", "write-of-nc-read", 32, "was read with ld.global.nc by another thread"),
]


@pytest.mark.parametrize("name, kind, n, text", [pytest.param(*h, marks=expect(h[1]), id=h[0]) for h in HAZARDS])
def test_hazards(name, kind, n, text):
    ops.fault(torch.randn(n).cuda(), name)
    assert text in found(kind) and re.search(r"(kernels.cu|intrinsics.hpp):\d+: '.*': block \d+, thread ", found(kind))


def test_same_values_are_no_conflict():
    ops.fault(torch.randn(32).cuda(), "blocks_agree")


@expect("assert")
def test_assert():
    x = torch.randn(5).cuda()
    torch.testing.assert_close(ops.fault(x, "asserts_nothing").cpu(), x.cpu())
    with pytest.raises(RuntimeError, match="device-side assert"):
        ops.fault(x, "asserts")
    assert "assertion 'i < n' failed" in found("assert")


@expect("deadlock")
def test_endless_loop(monkeypatch):
    monkeypatch.setitem(engine.OPTIONS, "max_steps", 20000)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        ops.fault(torch.zeros(64).cuda(), "endless")


@expect("launch-config")
@pytest.mark.parametrize(
    "name, error, text",
    [
        ("empty_grid", "invalid configuration", "invalid configuration"),
        ("large_block", "invalid configuration", "invalid configuration"),
        ("beyond_launch_bounds", "invalid argument", "65 threads, __launch_bounds__ says 64"),
        ("many_registers", "too many resources", "do not fit an SM"),
        ("no_opt_in", "invalid argument", "dynamic shared memory, limit"),
    ],
)
def test_launch_configuration(name, error, text):
    with pytest.raises(RuntimeError, match=error):
        ops.fault(torch.randn(64).cuda(), name)
    assert text in found("launch-config")


def test_opt_in_to_shared_memory_and_constant_memory():
    x = torch.randn(32).cuda()
    torch.testing.assert_close(ops.fault(x, "opt_in").cpu(), x.cpu())


@expect("stream")
def test_forgotten_stream():
    x = torch.randn(64).cuda()
    with torch.cuda.stream(torch.cuda.Stream()):
        ops.fault(x, "forgotten_stream")


@expect("stream-race")
@pytest.mark.parametrize("how", ["kernel", "aten", "copy"])
def test_missing_wait(how):
    x = torch.randn(2, 64).cuda()
    s = torch.cuda.Stream()
    s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        y = ops.scan(x, False)
    {"kernel": lambda: ops.scan(y, True), "aten": lambda: y + 1, "copy": lambda: y.cpu()}[how]()


def test_waits_are_understood():
    x = torch.randn(2, 64).cuda().requires_grad_()
    s, e = torch.cuda.Stream(), torch.cuda.Event()
    s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        y = ops.scan(x, False)
        e.record()
    e.wait()
    (y * 2).sum().backward()  # the backward of scan runs on s, autograd orders it
    torch.cuda.current_stream().wait_stream(s)
    x.grad.cpu()
    with torch.cuda.stream(s):
        z = x.detach() * 2
    s.synchronize()
    (z + 1).sum().item()


@expect("host")
@pytest.mark.parametrize("how", ["memset", "memcpy", "free", "stream"])
def test_host_calls(how):
    x = torch.zeros(8).cuda()
    p, invalid = ctypes.c_void_p(x.data_ptr()), engine.ERR["InvalidValue"]
    if how == "memset":
        assert runtime.cudaMemset(p, 0, ctypes.c_size_t(33)) == invalid
    elif how == "memcpy":
        assert runtime.cudaMemcpy(p, bytes(64), ctypes.c_size_t(64), 1) == invalid
    elif how == "free":
        assert runtime.cudaFree(ctypes.c_void_p(x.data_ptr() + 4)) == invalid
    else:
        stream = ctypes.c_void_p(torch.cuda.Stream(1).cuda_stream)
        assert ctypes.CDLL(os.environ["SAMPLE"]).fault(b"asserts_nothing", p, p, 8, stream) == 400  # cudaErrorInvalidResourceHandle


@expect("foreign-kernel")
def test_kernel_of_another_library():
    with pytest.raises(RuntimeError, match="not supported"):
        torch.cuda._sleep(1000)


@expect("unsupported")
def test_unsupported_instruction():
    with pytest.raises(RuntimeError, match="not supported"):
        ops.fault(-torch.rand(32).cuda(), "calls")
    assert "call of a device function" in found("unsupported")


@expect("internal")
def test_internal_error(monkeypatch):
    monkeypatch.setattr(engine, "attributes", lambda f: 1 / 0)
    with pytest.raises(RuntimeError, match="launch failure"):
        ops.add(torch.zeros(4).cuda(), torch.zeros(4).cuda(), 1.0)
    assert "ZeroDivisionError" in found("internal")
