"""What is handed on: names, requirements and content of the sdist and the wheel, and the workflows that make them."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import build_config  # noqa: E402


@pytest.mark.parametrize(
    ("torch_version", "torch_cuda", "expected"),
    [
        ("2.13.0+cpu", None, "0.1.0+torch2.13.cpu"),
        ("2.14.1", "13.0", "0.1.0+torch2.14.cu130"),
        ("2.8.0a0+git1234", "12.8", "0.1.0+torch2.8.cu128"),
    ],
)
def test_a_wheel_says_what_it_was_built_for(torch_version, torch_cuda, expected):
    name = build_config.wheel_version("0.1.0", torch_version, torch_cuda)
    assert name == expected
    assert str(Version(name)) == name  # PEP 440's normal form


def test_wheels_sort_by_version_then_torch_then_cuda():
    builds = [("2.9.1", None), ("2.9.1", "12.8"), ("2.9.1", "13.0"), ("2.10.0", None), ("2.13.0", None), ("2.13.0", "13.0")]
    names = ["0.1.0", *(build_config.wheel_version("0.1.0", *build) for build in builds), "0.2.0"]
    assert sorted(names, key=Version) == names


# Command lines as pip, build and setuptools make them.
COMMANDS = {
    "python -m build": (["bdist_wheel", "--dist-dir", "dist"], True),
    "pip, metadata": (["dist_info", "--output-dir", "x", "--keep-egg-info"], False),
    "pip, wheel": (["bdist_wheel", "--dist-info-dir", "x", "--dist-dir", "y"], False),
    "pip, editable": (["editable_wheel", "--dist-dir", "x"], False),
    "sdist": (["sdist", "--formats", "gztar"], False),
}


@pytest.mark.parametrize(("arguments", "expected"), COMMANDS.values(), ids=COMMANDS)
def test_only_a_wheel_without_announced_metadata_gets_a_local_version(arguments, expected):
    assert build_config.has_local_version(arguments) is expected


def setup_version(*arguments):
    environment = {**os.environ, "FUSED_CRITIC_BUILD_CUDA": "0"}
    command = [sys.executable, "setup.py", "--version", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.split()[-1]


def test_setup_applies_the_version():
    public = build_config.project_version(ROOT)
    assert setup_version("sdist") == public
    assert setup_version("editable_wheel") == public
    assert setup_version("bdist_wheel") == build_config.wheel_version(public, torch.__version__, None)


@pytest.mark.parametrize(
    ("built_for", "accepted", "refused"),
    [
        (None, ["2.8.0", "2.13.0+cpu", "3.0.0"], ["2.7.1"]),
        ("2.13.0+cpu", ["2.13.0", "2.13.0+cu130", "2.13.1"], ["2.12.1", "2.14.0", "2.1.3"]),
        ("2.14.0a0+git1234", ["2.14.0a0+git1234", "2.14.0"], ["2.13.0", "2.15.0"]),
    ],
)
def test_what_is_built_needs_the_minor_version_of_torch_that_it_was_built_against(built_for, accepted, refused):
    requirement = build_config.torch_requirement(built_for)
    assert requirement.startswith("torch")
    versions = SpecifierSet(requirement.removeprefix("torch"))
    assert [version for version in accepted + refused if versions.contains(version, prereleases=True)] == accepted


def test_the_installed_package_requires_this_torch():
    requires = [line for line in importlib.metadata.requires("fused-critic") if re.match(r"torch\b", line)]
    assert requires == [build_config.torch_requirement(torch.__version__)]


@pytest.fixture(scope="module")
def tracked():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def sdist(tracked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    # What a build leaves behind has no place in the archive.
    for name in (
        "python/fused_critic/_build_stamp.py",
        "python/fused_critic/_C.so",
        "tests/cpp/build/CMakeCache.txt",
        "examples/out/plot.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", "made"], cwd=folder, capture_output=True, check=True)
    (path,) = (folder / "made").iterdir()
    return path


def test_the_sdist_has_the_sources_the_tests_and_what_they_read(tracked, sdist):
    stem = f"fused_critic-{build_config.project_version(ROOT)}"
    assert sdist.name == f"{stem}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {member.name.removeprefix(f"{stem}/") for member in archive.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in names if name.startswith("python/fused_critic.egg-info/"))}
    assert names - made == set(tracked) - {".ci/run", ".gitignore"}


def test_the_sdist_accepts_every_supported_torch(sdist):
    with tarfile.open(sdist) as archive:
        metadata = archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/PKG-INFO").read().decode()
    assert re.findall(r"^Requires-Dist: (torch\b.*)$", metadata, re.MULTILINE) == [build_config.torch_requirement(None)]
    assert re.search("^Dynamic: requires-dist$", metadata, re.MULTILINE)  # or a wheel must not pin it


def workflow(name):
    import yaml  # not at the top: this file is read, and none of it run, where the CUDA kernels are tested

    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())


@pytest.mark.parametrize(("name", "job"), [("tests.yml", "cpu"), ("wheels.yml", "wheel")])
def test_workflows_cover_the_declared_versions(name, job):
    matrix = workflow(name)["jobs"][job]["strategy"]["matrix"]
    classifiers = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert matrix["python"] == classifiers
    minors = [build_config.release(version)[:2] for version in matrix["torch"]]
    assert minors[0] == build_config.MINIMUM_TORCH
    assert minors == [(2, minor) for minor in range(minors[0][1], minors[-1][1] + 1)]
    assert f"TORCH ?= torch=={matrix['torch'][-1]}\n" in (ROOT / "Makefile").read_text()


def test_every_cuda_wheel_has_a_toolkit():
    matrix = workflow("wheels.yml")["jobs"]["wheel"]["strategy"]["matrix"]
    assert [entry["torch"] for entry in matrix["include"]] == matrix["torch"]
    assert all(re.fullmatch(r"1[23]-\d", entry["cuda"]) for entry in matrix["include"])


def test_the_workflows_torch_is_that_of_the_makefile():
    torch_of_makefile = re.search(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    for path in (ROOT / ".github" / "workflows").iterdir():
        assert set(re.findall(r"torch==(\d[^+\"]*)\+cpu", path.read_text())) <= {torch_of_makefile}, path.name


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == build_config.project_version(ROOT)
