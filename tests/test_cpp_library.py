"""CMakeLists.txt: the operators as an installed C++ package, used by programs without Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fused_critic
import pytest
import torch
from fused_critic.check import cases
from fused_critic.check.torch_features import compiler_obstacle, inputs

ROOT = Path(__file__).resolve().parents[1]
# The one that the test extra brings lies beside Python, which need not be on the path.
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def run(*command, **kwargs):
    result = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}"
    return result.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder with the programs of tests/cpp, built against the installed package."""
    if CMAKE is None:
        pytest.skip("cmake is not installed")
    library = ROOT / "build" / f"cpp-torch{torch.__version__}"  # kept, so that a second run compiles only what changed
    prefix, folder = tmp_path_factory.mktemp("prefix"), tmp_path_factory.mktemp("programs")
    torch_prefix = torch.utils.cmake_prefix_path
    jobs = os.environ.get("MAX_JOBS", "2")

    log = run(CMAKE, "-S", ROOT, "-B", library, f"-DCMAKE_PREFIX_PATH={torch_prefix}", "-DFUSED_CRITIC_BUILD_CUDA=OFF")
    assert "building without CUDA: FUSED_CRITIC_BUILD_CUDA=OFF" in log
    assert (library / "compile_commands.json").exists()
    run(CMAKE, "--build", library, "--parallel", jobs)
    run(CMAKE, "--install", library, "--prefix", prefix)

    run(CMAKE, "-S", ROOT / "tests" / "cpp", "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix};{torch_prefix}")
    run(CMAKE, "--build", folder, "--parallel", jobs)
    return folder


def test_a_cpp_program_calls_both_operators(programs):
    assert run(programs / "use_operators").count(": ok") == 3


class CriticStep(torch.nn.Module):
    """A small critic with its loss."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(5, 1)

    def forward(self, observations, old_values, rewards, mask):
        values = self.head(observations).squeeze(-1)
        advantages, returns = fused_critic.gae(rewards, values, mask, gamma=0.99, lam=0.95)
        loss, stats = fused_critic.value_loss(values, old_values, returns + 1, mask)
        return advantages, loss, stats.explained_variance


def step_inputs(rows, columns):
    _, old_values, rewards, mask = inputs("cpu", (rows, columns))
    return torch.randn(rows, columns, 5, generator=torch.Generator().manual_seed(1)), old_values, rewards, mask


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A critic step as an AOTInductor package of dynamic shapes, and the module that it was made of."""
    obstacle = compiler_obstacle(torch.device("cpu"))
    if obstacle:
        pytest.skip(f"torch.compile does not work here: {obstacle}")
    torch.manual_seed(0)
    module = CriticStep().eval().requires_grad_(False)
    rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns")
    program = torch.export.export(module, step_inputs(4, 9), dynamic_shapes=({0: rows, 1: columns},) * 4)
    path = tmp_path_factory.mktemp("package") / "critic.pt2"
    return torch._inductor.aoti_compile_and_package(program, package_path=str(path)), module


SHAPES = [(4, 9), (7, 33)]  # that of the export and another


def test_a_compiled_package_runs_in_python(package):
    path, module = package
    loaded = torch._inductor.aoti_load_package(path)
    for shape in SHAPES:
        for got, expected in zip(loaded(*step_inputs(*shape)), module(*step_inputs(*shape)), strict=True):
            cases.assert_close(got, expected, 1e-5)


def test_a_compiled_package_runs_in_cpp(programs, package, tmp_path):
    path, module = package
    for shape in SHAPES:
        arguments = step_inputs(*shape)
        torch.save((list(arguments), list(module(*arguments))), tmp_path / "tensors.pt")
        assert run(programs / "run_package", path, tmp_path / "tensors.pt").count(": ok") == 3
