"""Builds fused_critic/_C, the one shared library with every operator. What is decided here and why: build_config.py."""

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

import build_config  # noqa: E402

# The others, sdist and egg_info above all, work without torch; and the requirements of the sdist are not those of one build.
COMMANDS_WITH_TORCH = {"bdist", "bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install"}


def say(line):
    print(f"fused_critic: {line}", file=sys.stderr, flush=True)


def import_torch():
    if importlib.util.find_spec("torch") is None:
        raise build_config.BuildError("there is no torch at build time: install torch first, then: pip install --no-build-isolation .")
    try:
        import torch
    except (ImportError, OSError) as error:
        raise build_config.BuildError(f"torch cannot be imported: {' '.join(str(error).split())}") from None
    build_config.check_torch(torch.__version__)
    return torch


def git_commit():
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def compiler_banner(compiler):
    try:
        return subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True).stdout
    except OSError:
        raise build_config.BuildError(f"no C++ compiler: {compiler} does not run (CXX selects another one)") from None


def write_if_changed(path, text):
    """Keeps the time stamp of an unchanged file, so that ninja does not compile again what includes it."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def c_literal(value):
    return "nullptr" if value is None else '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def arguments_without_extension(version):
    """Arguments of setup() for what needs no torch: the sdist."""
    return {"version": version, "install_requires": [build_config.torch_requirement(None)]}


def arguments_with_extension(version):
    """Arguments of setup() for a built package."""
    torch = import_torch()
    from torch.utils import cpp_extension

    toolkit = build_config.probe_toolkit(cpp_extension.CUDA_HOME) if torch.version.cuda else None
    decision = build_config.decide_cuda(os.environ.get(build_config.CUDA_SWITCH), torch.__version__, torch.version.cuda, toolkit)
    if build_config.has_local_version(sys.argv[1:]):
        version = build_config.wheel_version(version, torch.__version__, torch.version.cuda if decision.cuda else None)
    site_packages = [Path(torch.__file__).parents[1], Path(sysconfig.get_path("platlib"))]
    variant = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch.__version__}-{'cuda' if decision.cuda else 'cpu'}"
    scratch = ROOT / "build" / variant

    architectures = None
    macros, include_dirs, library_dirs = [], [str(scratch / "generated")], []
    compile_args = {"cxx": build_config.cxx_flags(compiler_banner(cpp_extension.get_cxx_compiler()))}
    for folder in cpp_extension.include_paths():
        compile_args["cxx"] += ["-isystem", folder]  # the warnings asked for are about our own code
    if decision.cuda:
        devices = range(torch.cuda.device_count())
        architectures = build_config.architecture_list(
            os.environ.get("TORCH_CUDA_ARCH_LIST"),
            toolkit,
            visible=[torch.cuda.get_device_capability(device) for device in devices],
            torch_supports=[(int(a[3:-1]), int(a[-1])) for a in torch.cuda.get_arch_list() if a.startswith("sm_") and a[3:].isdigit()],
        )
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        macros.append(("FUSED_CRITIC_WITH_CUDA", None))
        compile_args["nvcc"] = build_config.nvcc_flags(architectures, os.environ.get("NVCC_THREADS"))
        include_dirs += [*toolkit.include_dirs, *build_config.nvidia_include_dirs(site_packages)]
        library_dirs += toolkit.library_dirs
        cudart = build_config.find_cudart(toolkit.library_dirs, site_packages, toolkit.major)
        if cudart is None:
            raise build_config.BuildError(f"libcudart.so is neither in the toolkit of {toolkit.nvcc} nor in torch's nvidia packages")
        if cudart.name != "libcudart.so":  # the wheels carry no name that -lcudart finds
            link = scratch / "lib" / "libcudart.so"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(cudart)
            library_dirs.append(str(link.parent))

    stamp = {
        "version": version,
        "torch_version": torch.__version__,
        "cuda_version": toolkit.version if decision.cuda else None,
        "cuda_architectures": architectures,
        "build_decision": str(decision),
        "git_commit": git_commit(),
    }

    class BuildExtension(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(scratch)  # pip gives a new folder each time; here ninja finds what it built before

        def run(self):
            say(f"building {decision}" + (f", architectures {architectures}" if architectures else ""))
            defines = "".join(f"#define FUSED_CRITIC_{name.upper()} {c_literal(value)}\n" for name, value in stamp.items())
            write_if_changed(scratch / "generated" / "build_stamp.h", "#pragma once\n\n" + defines)
            start = time.monotonic()
            super().run()
            write_if_changed(Path(self.get_ext_fullpath("fused_critic._C")).with_name("_build_stamp.py"), f"BUILD = {stamp!r}\n")
            say(f"built in {time.monotonic() - start:.0f} s")

    make_extension = cpp_extension.CUDAExtension if decision.cuda else cpp_extension.CppExtension
    extension = make_extension(
        "fused_critic._C",
        build_config.find_sources(ROOT, decision.cuda),
        define_macros=macros,
        include_dirs=[],
        library_dirs=library_dirs,
        extra_compile_args=compile_args,
    )
    extension.include_dirs += include_dirs  # after torch's and the toolkit's own
    return {
        "version": version,
        "install_requires": [build_config.torch_requirement(torch.__version__)],
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
    }


def main():
    if build_config.release(setuptools.__version__) < build_config.MINIMUM_SETUPTOOLS:
        needed = ".".join(map(str, build_config.MINIMUM_SETUPTOOLS))
        raise build_config.BuildError(f"setuptools >= {needed} is needed, {setuptools.__version__} is installed: pip install -U setuptools")
    arguments = arguments_without_extension if COMMANDS_WITH_TORCH.isdisjoint(sys.argv[1:]) else arguments_with_extension
    setuptools.setup(**arguments(build_config.project_version(ROOT)))


try:
    main()
except build_config.BuildError as error:
    raise SystemExit(f"fused_critic: {error}") from None
