"""Compile the shim: libcudart.so.13 (fakecuda.cpp + generated stubs), a libcuda.so.1 that only refers to it, and - where the
nvidia-* wheels are not installed - empty stand-ins for the libraries that PyTorch's CUDA build wants to load (lean mode)."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
SHIM = HERE / "fakecuda.cpp"
ROOT = "cu|nccl|nvrtc|nvshmem|nvtx|nvJitLink|cusparseLt"


def site():
    return Path(os.environ.get("FAKECUDA_SITE") or sysconfig.get_paths()["purelib"])


def _run(*c):
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    return subprocess.run([str(x) for x in c], check=True, env=env, stdout=subprocess.PIPE, text=True).stdout


def _names(flag, f, types="TW"):
    out = []
    for ln in _run("nm", *flag, f).splitlines():
        p = ln.split()
        if p[-2] in types:
            out.append(p[-1])
    return out


def libraries():
    """Preload list; builds what is missing (cached by a hash of the sources). Processes may call it at the same time."""
    sp = site()
    lean = os.environ.get("FAKECUDA_LEAN", "") not in ("", "0") or not (sp / "nvidia/cu13/lib/libcublas.so.13").exists()
    torch = sp / "torch/lib/libtorch_cuda.so"
    if not torch.exists():
        raise SystemExit(f"fakecuda: no CUDA build of torch in {sp}")
    inputs = SHIM.read_bytes() + Path(__file__).read_bytes() + f"{torch} {torch.stat().st_size} {lean}".encode()
    cache = Path(os.environ.get("FAKECUDA_CACHE") or HERE.parent / "build").resolve()
    cache.mkdir(parents=True, exist_ok=True)
    out = cache / hashlib.sha256(inputs).hexdigest()[:16]
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            tmp = out.with_suffix(".tmp")
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir()
            _build(tmp, sp, lean)
            tmp.rename(out)
    first = [out / "libcudart.so.13", out / "libcuda.so.1"]
    return first + sorted(p for p in out.glob("lib*.so*") if p not in first)


def _link(tmp, soname, version, objs, *more):
    (tmp / "v.map").write_text(f"{version} {{ global: cu*; nccl*; nvrtc*; nvshmem*; nvJitLink*; nvtx*; __cuda*; fc_*; local: *; }};\n")
    _run(
        os.environ.get("CXX", "g++"),
        "-shared",
        "-o",
        tmp / soname,
        *objs,
        f"-Wl,-soname,{soname}",
        f"-Wl,--version-script={tmp / 'v.map'}",
        "-static-libstdc++",
        "-static-libgcc",
        *more,
    )


def _stubs(tmp, name, todo, call):
    (tmp / f"{name}.cpp").write_text(
        f'extern "C" {{\nint {call}(const char*);\n' + "".join(f'int {n}() {{ return {call}("{n}"); }}\n' for n in sorted(todo)) + "}\n"
    )
    _run(os.environ.get("CXX", "g++"), "-O0", "-fno-builtin", "-w", "-fPIC", "-c", tmp / f"{name}.cpp", "-o", tmp / f"{name}.o")
    return tmp / f"{name}.o"


def _build(tmp, sp, lean):
    cxx = os.environ.get("CXX", "g++")
    _run(
        cxx,
        "-std=c++17",
        "-O2",
        "-g",
        "-fPIC",
        "-Wall",
        f"-I{sp / 'nvidia/cu13/include'}",
        f"-I{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/include",
        "-c",
        SHIM,
        "-o",
        tmp / "shim.o",
    )
    have = set(_names(["--defined-only"], tmp / "shim.o"))
    wanted = defaultdict(set)
    libs = [p for p in (sp / "torch/lib").glob("*.so*") if p.is_file()]
    defined = set()
    for f in libs:
        defined.update(n.split("@")[0] for n in _names(["-D", "--defined-only"], f, "TWVBDRiu") if n.startswith(("cu", "nccl", "nv")))
        for n in _names(["-D", "--undefined-only"], f, "Uw"):
            n, _, v = n.partition("@")
            if re.match(rf"(__)?({ROOT})", n) and n not in have:
                wanted[v].add(n)
    cudart = wanted.pop("libcudart.so.13", set())
    real = sp / "nvidia/cu13/lib/libcudart.so.13"
    if real.exists():
        cudart |= {n for n in (x.split("@")[0] for x in _names(["-D", "--defined-only"], real)) if "cuda" in n.lower()} - have
    _link(
        tmp, "libcudart.so.13", "libcudart.so.13", [tmp / "shim.o", _stubs(tmp, "stubs", cudart, "fc_unimplemented")], "-ldl", "-lpthread"
    )
    (tmp / "empty.cpp").write_text("")
    _run(
        cxx,
        "-shared",
        "-o",
        tmp / "libcuda.so.1",
        tmp / "empty.cpp",
        "-Wl,-soname,libcuda.so.1",
        "-Wl,--no-as-needed",
        tmp / "libcudart.so.13",
    )
    if lean:
        need = set()
        for f in libs:
            need |= set(re.findall(r"NEEDED.*\[(lib(?:cu|nv|nccl)[^\]]*)\]", _run("readelf", "-d", f)))
        need -= {"libcudart.so.13", "libcuda.so.1"}
        plain = {n for n in wanted.pop("", set()) if n not in defined}
        for so in sorted(need):
            ver = "NVSHMEM" if "nvshmem" in so else so
            todo = wanted.pop(ver, set()) | (plain if so.startswith("libnccl") else set())
            _link(tmp, so, ver, [_stubs(tmp, so, todo, "fc_absent")], tmp / "libcudart.so.13")
    for f in [*tmp.glob("*.o"), *tmp.glob("*.cpp"), tmp / "v.map"]:
        f.unlink()


if __name__ == "__main__":
    print(*libraries(), sep="\n")
