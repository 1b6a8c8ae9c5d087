"""The CPU kernels give the same bits on every instruction set, and nothing but them needs more than plain x86-64."""

import os
import platform
import re
import shutil
import subprocess
import sys

import fused_critic
import pytest
import torch

# Every dtype, with gaps and odd lengths; prints the instruction set and a digest of all results.
PROGRAM = """
import hashlib, torch, fused_critic
digest = hashlib.sha256()
# Scrambled integers over a power of two: torch.randn itself depends on the instruction set.
scrambled = (torch.arange(4 * 5 * 1237) * 7919 % 4093 - 2046).view(4, 5, 1237)
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    x = [(numbers / 1024).to(dtype) for numbers in scrambled[:3]]
    mask = scrambled[3] % 10 < 7
    for time_dim in (0, 1):
        values = x[0].clone().requires_grad_()
        loss, stats = fused_critic.value_loss(values, x[1], x[2], mask, reduction="seq-mean-token-mean", time_dim=time_dim)
        loss.backward()
        for options in ({"criterion": "huber", "delta": 0.3}, {"clip_range": x[1].abs(), "clip_only": True, "loss_clamp": 0.2}):
            leaf = x[0].clone().requires_grad_()
            other, more = fused_critic.value_loss(leaf, x[1], x[2], mask, time_dim=time_dim, **options)
            other.backward()
            for tensor in (other.detach(), more.moments, leaf.grad):
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        out = fused_critic.gae(x[2], x[0], mask, gamma=0.99, lam=0.95, time_dim=time_dim)
        out += fused_critic.gae(x[2], x[0], gamma=0.99, lam=0.95, time_dim=time_dim)
        ends, padding = scrambled[3] % 61 == 0, torch.arange(1237) < 1000 + 50 * torch.arange(5)[:, None]
        out += fused_critic.gae(x[2], x[0], mask, terminated=ends, gamma=0.99, lam=0.95, time_dim=time_dim)
        out += fused_critic.gae(x[2], x[0], padding, next_values=x[1], terminated=ends, gamma=0.99, lam=0.95, time_dim=time_dim)
        scanned = fused_critic.reverse_scan(x[2], x[0].requires_grad_(), time_dim=time_dim)
        out += (scanned.detach(), *torch.autograd.grad(scanned.sum(), x[0]))
        x[0] = x[0].detach()
        out += fused_critic.vtrace(x[2], x[0], x[1], mask, terminated=ends, gamma=0.99, lam=0.95, time_dim=time_dim)
        for tensor in (loss.detach(), stats.moments, values.grad, *out, fused_critic.gae(x[2], x[0], gamma=0.99, lam=0.95).returns):
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
print(torch.ops.fused_critic._cpu_capability(), digest.hexdigest())
"""


def run(capability):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_same_bits():
    best = torch.backends.cpu.get_cpu_capability()
    if platform.machine() != "x86_64" or best == "DEFAULT":
        pytest.skip("needs an x86-64 CPU with AVX2: there is one instruction set to choose from here")
    expected = run("default")
    assert expected[0] == "DEFAULT"
    for capability in ["avx2"] + (["avx512"] if best == "AVX512" else []):
        assert run(capability) == [capability.upper(), expected[1]]


def avx_instructions(library):
    """How many instructions of AVX, AVX2 or AVX-512 each function of an unstripped library has; functions without one are left out."""
    counts, function = {}, None
    disassembly = subprocess.run(["objdump", "-d", "-w", "--no-show-raw-insn", library], capture_output=True, text=True, check=True).stdout
    for line in disassembly.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            function = header[1]
        # AVX mnemonics begin with v; AVX-512's on mask registers with k; no other instruction that a compiler makes does.
        elif re.match(r"\s+[0-9a-f]+:\t[vk]", line):
            counts[function] = counts.get(function, 0) + 1
    return counts


needs_objdump = pytest.mark.skipif(shutil.which("objdump") is None or platform.machine() != "x86_64", reason="needs objdump, on x86-64")


@needs_objdump
def test_only_the_dispatched_kernels_have_avx_instructions():
    """An inline function that several sources share exists once in the library; compiled for AVX2 there, it would fail on an older CPU."""
    library = fused_critic._C.__file__
    if not subprocess.run(["nm", library], capture_output=True, text=True).stdout:
        pytest.skip("the library is stripped")
    counts = avx_instructions(library)
    dispatched = {name for name in counts if re.search("4avx2|6avx512", name)}  # the namespaces, as C++ mangles them
    assert len(dispatched) > 50
    assert set(counts) - dispatched == set()


@needs_objdump
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_an_avx_instruction_elsewhere_is_found(tmp_path):
    source = tmp_path / "shared.cpp"
    source.write_text(
        """#pragma GCC target("avx2")
        float sum(const float* x) { float s = 0; for (int i = 0; i < 64; i++) s += x[i]; return s; }
        """
    )
    subprocess.run(["g++", "-O3", "-shared", "-fPIC", source, "-o", tmp_path / "shared.so"], check=True)
    assert set(avx_instructions(str(tmp_path / "shared.so"))) == {"_Z3sumPKf"}
