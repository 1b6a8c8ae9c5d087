"""The build: its decisions, its one-line errors, and what the built package says about itself."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fused_critic
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import build_config  # noqa: E402
from build_config import BuildError, Toolkit, decide_cuda  # noqa: E402

IMPORT_LIMIT_S = 0.1  # beyond importing torch
NVCC_13 = Toolkit("/cuda/bin/nvcc", "13.0", ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1"))
NVCC_12_4 = Toolkit("/cuda/bin/nvcc", "12.4", ("5.0", "6.0", "7.0", "7.5", "8.0", "8.6", "8.9", "9.0"))


@pytest.mark.parametrize("request_", [None, "auto", "AUTO", "1"])
def test_cuda_is_built_with_nvcc_and_a_cuda_torch(request_):
    decision = decide_cuda(request_, "2.13.0", "13.0", NVCC_13)
    assert decision.cuda
    assert str(decision).startswith("with CUDA: nvcc 13.0 (/cuda/bin/nvcc)")


OBSTACLES = {
    "CPU torch": (("2.13.0+cpu", None, NVCC_13), "torch 2.13.0+cpu is not a CUDA build"),
    "no nvcc": (("2.13.0", "13.0", None), "no nvcc found"),
    "other major version": (("2.13.0", "13.0", NVCC_12_4), "nvcc 12.4 (/cuda/bin/nvcc) does not match torch 2.13.0 with CUDA 13.0"),
}


@pytest.mark.parametrize(("facts", "reason"), OBSTACLES.values(), ids=OBSTACLES)
def test_an_obstacle_means_no_cuda_or_one_clear_line(facts, reason):
    decision = decide_cuda("auto", *facts)
    assert not decision.cuda
    assert reason in str(decision)
    with pytest.raises(BuildError) as error:
        decide_cuda("1", *facts)
    assert str(error.value).startswith("FUSED_CRITIC_BUILD_CUDA=1, but ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_cuda_can_be_switched_off():
    assert decide_cuda("0", "2.13.0", "13.0", NVCC_13) == build_config.Decision(False, "FUSED_CRITIC_BUILD_CUDA=0")


def test_another_minor_version_of_cuda_is_no_obstacle():
    assert decide_cuda("auto", "2.8.0", "12.8", NVCC_12_4).cuda


@pytest.mark.parametrize("value", ["yes", "2", "on"])
def test_an_unknown_switch_is_an_error(value):
    with pytest.raises(BuildError, match=f"FUSED_CRITIC_BUILD_CUDA={value} is not understood: use 0, 1 or auto"):
        decide_cuda(value, "2.13.0", "13.0", NVCC_13)


def test_old_torch_is_refused():
    build_config.check_torch("2.8.0")
    build_config.check_torch("2.13.0+cpu")
    build_config.check_torch("2.14.0a0+git1234")
    with pytest.raises(BuildError, match=r"torch >= 2\.8 is needed, torch 2\.7\.1\+cu128 is installed"):
        build_config.check_torch("2.7.1+cu128")


@pytest.mark.parametrize(
    ("toolkit", "expected"),
    [(NVCC_13, "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"), (NVCC_12_4, "7.5;8.0;8.6;8.9;9.0+PTX")],
    ids=["CUDA 13.0", "CUDA 12.4"],
)
@pytest.mark.parametrize("request_", [None, "", "native"])
def test_default_architectures_are_those_nvcc_knows(request_, toolkit, expected):
    assert build_config.architecture_list(request_, toolkit) == expected


def test_the_users_architectures_are_kept():
    assert build_config.architecture_list("9.0a Hopper", NVCC_13, visible=[(8, 0)]) == "9.0a Hopper"


def test_visible_gpus_choose_the_architectures():
    assert build_config.architecture_list(None, NVCC_13, visible=[(9, 0), (8, 0), (9, 0)]) == "8.0;9.0+PTX"
    assert build_config.architecture_list(None, NVCC_12_4, visible=[(12, 0)]) == "9.0+PTX"
    assert build_config.architecture_list(None, NVCC_13, visible=[(12, 1)], torch_supports=[(8, 0), (12, 0)]) == "12.0+PTX"


def test_torch_adds_architecture_flags_only_where_there_are_none_of_ours(monkeypatch):
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    default = build_config.architecture_list(None, NVCC_13)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", default)
    assert _get_cuda_arch_flags(build_config.nvcc_flags(default)) == []
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert _get_cuda_arch_flags(build_config.nvcc_flags("9.0a")) == ["-gencode=arch=compute_90a,code=sm_90a"]


def test_ptx_is_made_once_for_all_architectures_that_the_sources_do_not_tell_apart():
    flags = build_config.nvcc_flags("7.5;8.0;8.6;9.0;12.0+PTX", threads="4")
    assert "-lineinfo" in flags
    assert "--threads=4" in flags
    assert [flag for flag in flags if "arch" in flag] == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_86",
        "-gencode=arch=compute_80,code=sm_90",
        "-gencode=arch=compute_80,code=sm_120",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    assert build_config.gencode_flags("7.0") == ["-gencode=arch=compute_70,code=sm_70"]


@pytest.mark.parametrize("architectures", ["Ampere", "9.0a", "8.0;Hopper", ""])
def test_architectures_that_only_torch_understands_are_left_to_torch(architectures):
    assert build_config.gencode_flags(architectures) == []


def test_the_sources_tell_no_other_architectures_apart():
    conditions = [
        line
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.suffix in (".h", ".cuh", ".cu")
        for line in path.read_text().splitlines()
        if "__CUDA_ARCH__" in line
    ]
    generations = {build_config.release(generation) for generation in build_config.PTX_GENERATIONS}
    numbers = {int(number) for line in conditions for number in re.findall(r"__CUDA_ARCH__ >= (\d+)", line)}
    assert conditions
    assert {(number // 100, number % 100 // 10) for number in numbers} <= generations
    assert all(re.search(r"__CUDA_ARCH__ >= \d+|defined\(__CUDA_ARCH__\)", line) for line in conditions)


def test_openmp_is_for_the_compiler_alone_and_gcc_on_linux():
    assert "-fopenmp" in build_config.cxx_flags("g++ (GCC) 12.2.0", platform="linux")
    assert "-fopenmp" not in build_config.cxx_flags("clang version 18.1.0", platform="linux")
    assert "-fopenmp" not in build_config.cxx_flags("g++", platform="darwin")


def test_the_same_bits_on_every_cpu():
    flags = build_config.cxx_flags("g++")
    assert "-ffp-contract=off" in flags
    assert not any(flag.startswith(("-march", "-mtune", "-ffast-math")) for flag in flags)


def test_every_source_is_built_and_has_its_own_object():
    cpu, everything = build_config.find_sources(ROOT, cuda=False), build_config.find_sources(ROOT, cuda=True)
    assert {"csrc/ops.cpp", "csrc/build_info.cpp", "csrc/gae.cpp", "csrc/cpu/gae.cpp"} <= set(cpu)
    assert {"csrc/cuda/gae.cu", "csrc/cuda/value_loss.cu"} <= set(everything) - set(cpu)


def test_sources_that_would_share_an_object_are_refused(tmp_path):
    (tmp_path / "csrc").mkdir()
    for name in ("gae.cpp", "gae.cu"):
        (tmp_path / "csrc" / name).touch()
    with pytest.raises(AssertionError, match="gae.o"):
        build_config.find_sources(tmp_path, cuda=True)


@pytest.mark.parametrize("layout", ["nvidia/cu13", "nvidia/cuda_runtime"])
def test_headers_and_runtime_are_found_in_torchs_nvidia_packages(tmp_path, layout):
    folder = tmp_path / layout
    (folder / "include").mkdir(parents=True)
    (folder / "lib").mkdir()
    (folder / "lib" / "libcudart.so.13").touch()
    assert build_config.nvidia_include_dirs([tmp_path]) == [str(folder / "include")]
    assert build_config.find_cudart([], [tmp_path], 13) == folder / "lib" / "libcudart.so.13"
    assert build_config.find_cudart([], [tmp_path], 12) is None
    toolkit = tmp_path / "lib64"
    toolkit.mkdir()
    (toolkit / "libcudart.so").touch()
    assert build_config.find_cudart([str(toolkit)], [tmp_path], 13) == toolkit / "libcudart.so"


def make_nvcc(folder, body):
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{body}\n")
    nvcc.chmod(0o755)


def test_the_toolkit_is_described_by_nvcc_itself(tmp_path):
    real = tmp_path / "cuda"
    (real / "bin" / "include").mkdir(parents=True)
    make_nvcc(
        tmp_path / "wrapper",
        f"""case "$1" in
        --version) echo "Cuda compilation tools, release 12.8, V12.8.93";;
        --list-gpu-arch) echo compute_75; echo compute_120;;
        --dryrun) echo '#$ INCLUDES="-I{real}/bin/../bin/include" "-I{real}/none"' >&2
                  echo '#$ LIBRARIES= "-L{real}/bin"' >&2;;
        esac""",
    )
    toolkit = build_config.probe_toolkit(str(tmp_path / "wrapper"))
    assert (toolkit.version, toolkit.major, toolkit.architectures) == ("12.8", 12, ("7.5", "12.0"))
    assert toolkit.include_dirs == (str(real / "bin" / "include"),)
    assert toolkit.library_dirs == (str(real / "bin"),)


def test_a_missing_or_broken_nvcc_is_no_toolkit(tmp_path):
    assert build_config.probe_toolkit(None) is None
    assert build_config.probe_toolkit(str(tmp_path)) is None
    make_nvcc(tmp_path, "exit 1")
    assert build_config.probe_toolkit(str(tmp_path)) is None


def run_setup(*arguments, **environment):
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def assert_one_line(result, expected):
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].startswith("fused_critic: ")
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_setup_ends_with_one_line_for_an_unknown_switch():
    assert_one_line(run_setup("build_ext", FUSED_CRITIC_BUILD_CUDA="maybe"), "FUSED_CRITIC_BUILD_CUDA=maybe is not understood")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_setup_ends_with_one_line_when_cuda_is_asked_of_a_cpu_torch():
    assert_one_line(run_setup("build_ext", FUSED_CRITIC_BUILD_CUDA="1"), "=1, but torch")


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is a CPU build")
def test_setup_ends_with_one_line_when_cuda_is_asked_without_nvcc(tmp_path):
    assert_one_line(run_setup("build_ext", FUSED_CRITIC_BUILD_CUDA="1", CUDA_HOME=str(tmp_path)), "=1, but no nvcc found")


@pytest.fixture
def torchless_python(tmp_path):
    """An interpreter with setuptools but without torch."""
    setuptools = pytest.importorskip("setuptools")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    installed = Path(setuptools.__file__).parents[1]
    for path in (installed / "setuptools", installed / "_distutils_hack", *installed.glob("setuptools-*.dist-info")):
        (packages / path.name).symlink_to(path)
    return tmp_path / "venv" / "bin" / "python"


def test_setup_without_torch_says_what_to_do(torchless_python):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(torchless_python), "setup.py", "build_ext"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert_one_line(result, "install torch first, then: pip install --no-build-isolation")


def test_the_version_is_written_once():
    version = fused_critic.__version__
    assert version == fused_critic._C.build_info()["version"] == importlib.metadata.version("fused-critic")
    assert version.partition("+")[0] == build_config.project_version(ROOT)  # what follows the + says what it was built for


def test_build_info_is_about_this_build():
    info = fused_critic._C.build_info()
    assert set(info) == {"version", "torch_version", "cuda_version", "cuda_architectures", "compiler", "build_decision", "git_commit"}
    assert info["torch_version"] == torch.__version__
    assert info["build_decision"].startswith("with CUDA: " if info["cuda_version"] else "without CUDA: ")


def run_module(*arguments):
    return subprocess.run([sys.executable, "-m", "fused_critic", *arguments], capture_output=True, text=True)


def test_info_in_words():
    result = run_module("info")
    assert result.returncode == 0, result.stderr
    operators = ("fused_critic::gae(", "fused_critic::value_loss(")
    for expected in (f"torch: {torch.__version__}", "build decision: with", "cpu capability: ", *operators):
        assert expected in result.stdout


def test_info_as_json():
    info = json.loads(run_module("info", "--json").stdout)
    assert info["torch"] == info["torch_compiled_against"] == torch.__version__
    assert info["warnings"] == []
    assert any(device.startswith("cpu") for device in info["devices"])


def test_a_command_is_needed():
    result = run_module()
    assert result.returncode == 2
    assert "usage: python -m fused_critic" in result.stderr


def import_with_torch(version):
    code = f"""
import sys, torch
torch.__version__ = {version!r}
try:
    import fused_critic
except ImportError as error:
    print(error)
print("fused_critic._C" in sys.modules)
"""
    *message, loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    return message, loaded == "True"


def test_a_library_for_another_minor_version_of_torch_is_not_loaded():
    (message,), loaded = import_with_torch("2.99.0+cpu")
    assert not loaded
    assert f"built for torch {torch.__version__}, but torch 2.99.0+cpu is installed" in message
    assert "install its wheel for torch 2.99" in message
    assert "pip install --no-build-isolation" in message


def test_a_patch_release_of_torch_is_accepted():
    minor = ".".join(torch.__version__.split(".")[:2])
    assert import_with_torch(f"{minor}.99+cu999") == ([], True)


def test_a_library_that_cannot_be_loaded_says_so():
    from fused_critic import _load

    message = _load._explain(ImportError("undefined symbol: _ZN3c10"))
    assert f"built for this torch ({torch.__version__}), but its library cannot be loaded" in message
    assert "pip install --no-build-isolation" in message
    assert "undefined symbol" in message


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_no_second_openmp_runtime_is_loaded():
    needed = subprocess.run(["readelf", "-d", fused_critic._C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed
    assert "omp" not in needed


def test_import_is_cheap():
    code = "import time, torch; start = time.perf_counter(); import fused_critic; print(time.perf_counter() - start)"
    times = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(times) < IMPORT_LIMIT_S, times
