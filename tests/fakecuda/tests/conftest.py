"""What the tests of fakecuda share: compiled PTX, the sample extension, and programs run on the shim."""

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SESSION = HERE / "session"
BUILD = HERE.parent / "build" / "tests"
SITE = Path(sysconfig.get_paths()["purelib"])
NVCC = shutil.which("nvcc") or "nvcc"
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


def made(target, sources, make):
    """``target``, made by ``make(path)`` unless it is newer than its sources; processes may ask for it at the same time."""
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / target
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists() or path.stat().st_mtime < max(s.stat().st_mtime for s in [*sources, Path(__file__)]):
            make(path)
    return path


def nvcc(*arguments):
    subprocess.check_call([NVCC, "-O3", "-std=c++17", "-lineinfo", *map(str, arguments)])


@pytest.fixture(scope="session")
def ptx():
    """(source, architecture) -> its PTX as a ptxsim module."""
    from fakecuda import ptxsim

    modules = {}

    def module(source, arch):
        if (source, arch) not in modules:
            path = made(f"{source}.{arch}.ptx", [HERE / source], lambda out: nvcc("-ptx", f"-arch={arch}", "-o", out, HERE / source))
            modules[source, arch] = ptxsim.Module.from_file(path)
        return modules[source, arch]

    return module


def compile_kernels(out):
    code = ["-gencode=arch=compute_75,code=compute_75", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
    nvcc(*code, "-Xcompiler", "-fPIC", "-c", SESSION / "kernels.cu", "-o", out)


def compile_operators(out):
    include = [SITE / "torch/include", SITE / "torch/include/torch/csrc/api/include", CUDA / "include"]
    flags = ["-O0", "-std=c++20", "-fPIC", *(f"-I{p}" for p in include)]
    subprocess.check_call(["g++", *flags, "-c", SESSION / "operators.cpp", "-o", out])


def link(out, *objects):
    libraries = [f"-L{SITE / 'torch/lib'}", "-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch_cuda", f"-L{CUDA / 'lib64'}", "-lcudart"]
    subprocess.check_call(["g++", "-shared", "-o", out, *objects, *libraries, f"-Wl,-rpath,{SITE / 'torch/lib'}"])


@pytest.fixture(scope="session")
def extension():
    """The sample extension: PTX for compute_75 and compute_90, machine code for sm_90."""
    header = SESSION / "kernels.h"
    objects = [
        made("kernels.o", [SESSION / "kernels.cu", header], compile_kernels),
        made("operators.o", [SESSION / "operators.cpp", header], compile_operators),
    ]
    return made("sample.so", objects, lambda out: link(out, *objects))


@pytest.fixture(scope="session")
def sass_only():
    """A library of a kernel without PTX."""
    source = SESSION / "sass_only.cu"
    arguments = ["-gencode=arch=compute_90,code=sm_90", "-shared", "-cudart", "shared", "-Xcompiler", "-fPIC", source]
    return made("sass_only.so", [source], lambda out: nvcc(*arguments, "-o", out))


@pytest.fixture
def fakecuda(tmp_path):
    """Runs ``python -m fakecuda ARGUMENTS`` -> CompletedProcess with the output as text."""

    def run(*arguments, check=True, **environment):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "FAKECUDA_"))}
        env.update(PYTHONPATH=str(HERE.parent), OMP_NUM_THREADS="1", **environment)
        command = [sys.executable, "-m", "fakecuda", *map(str, arguments)]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE.parent)
        assert not check or done.returncode == 0, done.stdout
        return done

    return run
