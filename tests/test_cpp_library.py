"""CMakeLists.txt: the operators as an installed C++ package, used by a program without Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# The one that the test extra brings lies beside Python, which need not be on the path.
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def run(*command, **kwargs):
    result = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}"
    return result.stdout


@pytest.mark.skipif(CMAKE is None, reason="cmake is not installed")
def test_a_cpp_program_calls_both_operators(tmp_path):
    library = ROOT / "build" / f"cpp-torch{torch.__version__}"  # kept, so that a second run compiles only what changed
    prefix, program = tmp_path / "prefix", tmp_path / "program"
    torch_prefix = torch.utils.cmake_prefix_path
    jobs = os.environ.get("MAX_JOBS", "2")

    log = run(CMAKE, "-S", ROOT, "-B", library, f"-DCMAKE_PREFIX_PATH={torch_prefix}", "-DFUSED_CRITIC_BUILD_CUDA=OFF")
    assert "building without CUDA: FUSED_CRITIC_BUILD_CUDA=OFF" in log
    assert (library / "compile_commands.json").exists()
    run(CMAKE, "--build", library, "--parallel", jobs)
    run(CMAKE, "--install", library, "--prefix", prefix)

    run(CMAKE, "-S", ROOT / "tests" / "cpp", "-B", program, f"-DCMAKE_PREFIX_PATH={prefix};{torch_prefix}")
    run(CMAKE, "--build", program)
    assert run(program / "use_operators").count(": ok") == 3
