"""What is built, and how: the decisions of setup.py, apart from torch and setuptools so that tests reach them. Nothing is run but nvcc."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 8)
MINIMUM_SETUPTOOLS = (77, 0, 3)  # the first that reads an SPDX `license` from pyproject.toml; torch asks for the same
CUDA_SWITCH = "FUSED_CRITIC_BUILD_CUDA"

# One entry per GPU generation with its own machine code; those the installed nvcc does not know are dropped, the last also gets PTX.
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

# What the CUDA sources tell apart by __CUDA_ARCH__. C++ is translated to PTX once for each, and that to the machine code of every architecture from
# there on: nvcc spends three quarters of its time on the way to PTX, which is the same for all of them.
PTX_GENERATIONS = ("7.5", "8.0")

CXX_FLAGS = (
    "-O3",
    "-g0",
    "-ffp-contract=off",  # contraction depends on the instruction set; without it every CPU gives the same bits
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
)
NVCC_FLAGS = ("-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden")


class BuildError(Exception):
    """Something the user has to change; the message is one line."""


@dataclass(frozen=True)
class Toolkit:
    """The CUDA toolkit behind one nvcc, as nvcc itself describes it (nvcc on PATH may be a wrapper far from its headers)."""

    nvcc: str
    version: str
    architectures: tuple[str, ...]
    include_dirs: tuple[str, ...] = ()
    library_dirs: tuple[str, ...] = ()

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


@dataclass(frozen=True)
class Decision:
    cuda: bool
    reason: str

    def __str__(self) -> str:
        return f"{'with' if self.cuda else 'without'} CUDA: {self.reason}"


def release(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def check_torch(version: str) -> None:
    if release(version) < MINIMUM_TORCH:
        raise BuildError(f"torch >= {'.'.join(map(str, MINIMUM_TORCH))} is needed, torch {version} is installed: pip install -U torch")


def _ask(*command: str) -> str:
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def probe_toolkit(cuda_home: str | None) -> Toolkit | None:
    """The toolkit of `cuda_home`/bin/nvcc, None where there is none that runs."""
    if not cuda_home:
        return None
    nvcc = Path(cuda_home, "bin", "nvcc")
    if not nvcc.exists():
        return None
    try:
        version = re.search(r"release (\d+\.\d+)", _ask(str(nvcc), "--version"))
        architectures = re.findall(r"compute_(\d+)(\d)\b", _ask(str(nvcc), "--list-gpu-arch"))
        settings = dict(re.findall(r"^#\$ (INCLUDES|LIBRARIES)=(.*)$", _ask(str(nvcc), "--dryrun", "-c", "none.cu"), re.MULTILINE))
    except (OSError, subprocess.CalledProcessError):
        return None
    if version is None:
        return None
    return Toolkit(
        nvcc=str(nvcc),
        version=version[1],
        architectures=tuple(sorted({f"{major}.{minor}" for major, minor in architectures}, key=release)),
        include_dirs=_folders(settings.get("INCLUDES", ""), "-I"),
        library_dirs=_folders(settings.get("LIBRARIES", ""), "-L"),
    )


def _folders(setting: str, option: str) -> tuple[str, ...]:
    words = (word for word in shlex.split(setting) if word.startswith(option))
    return tuple(dict.fromkeys(str(Path(word[len(option) :]).resolve()) for word in words if Path(word[len(option) :]).is_dir()))


def decide_cuda(request: str | None, torch_version: str, torch_cuda: str | None, toolkit: Toolkit | None) -> Decision:
    """CUDA is built where nvcc and a CUDA build of torch, of one major version, are both there; whether a GPU is visible plays no part."""
    request = (request or "auto").strip().lower()
    if request not in ("0", "1", "auto"):
        raise BuildError(f"{CUDA_SWITCH}={request} is not understood: use 0, 1 or auto")
    if request == "0":
        return Decision(False, f"{CUDA_SWITCH}=0")

    if torch_cuda is None:
        obstacle = f"torch {torch_version} is not a CUDA build"
    elif toolkit is None:
        searched = "CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda"
        obstacle = f"no nvcc found ({searched}) for torch {torch_version} with CUDA {torch_cuda}"
    elif toolkit.major != release(torch_cuda)[0]:
        obstacle = f"nvcc {toolkit.version} ({toolkit.nvcc}) does not match torch {torch_version} with CUDA {torch_cuda}"
    else:
        return Decision(True, f"nvcc {toolkit.version} ({toolkit.nvcc}) and torch {torch_version} with CUDA {torch_cuda}")
    if request == "1":
        raise BuildError(f"{CUDA_SWITCH}=1, but {obstacle}")
    return Decision(False, obstacle)


def architecture_list(
    request: str | None, toolkit: Toolkit, visible: Iterable[tuple[int, int]] = (), torch_supports: Iterable[tuple[int, int]] = ()
) -> str:
    """The value for TORCH_CUDA_ARCH_LIST: the user's, else the visible GPUs', else the default list."""
    if request and request.strip().lower() != "native":
        return request
    known = [release(architecture) for architecture in toolkit.architectures]
    chosen = sorted({_newest_supported(capability, known, sorted(torch_supports)) for capability in visible})
    if not chosen:
        chosen = [release(a) for a in DEFAULT_ARCHITECTURES if release(a) in known]
    if not chosen:
        raise BuildError(f"nvcc {toolkit.version} knows none of {' '.join(DEFAULT_ARCHITECTURES)}: set TORCH_CUDA_ARCH_LIST")
    return ";".join(f"{major}.{minor}" for major, minor in chosen) + "+PTX"


def _newest_supported(capability: tuple[int, int], *supported: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """`capability`, or what an older nvcc or torch can do for that GPU: PTX of the newest architecture they know."""
    return min([tuple(capability), *(max(versions) for versions in supported if versions)])


def nvidia_packages(site_packages: Iterable[Path]) -> list[Path]:
    """Folders of the nvidia wheels: nvidia/cu13 (one for all) or nvidia/<library> (one each)."""
    return [folder for site in site_packages for folder in sorted(Path(site, "nvidia").glob("*")) if folder.is_dir()]


def nvidia_include_dirs(site_packages: Iterable[Path]) -> list[str]:
    return [str(folder / "include") for folder in nvidia_packages(site_packages) if (folder / "include").is_dir()]


def find_cudart(library_dirs: Iterable[str], site_packages: Iterable[Path], major: int) -> Path | None:
    """The shared CUDA runtime: the toolkit's libcudart.so, else the nvidia wheels' libcudart.so.<major>."""
    candidates = [Path(folder, "libcudart.so") for folder in library_dirs]
    candidates += [folder / "lib" / f"libcudart.so.{major}" for folder in nvidia_packages(site_packages)]
    return next((path for path in candidates if path.exists()), None)


def cxx_flags(compiler: str, platform: str = sys.platform) -> list[str]:
    """at::parallel_for is inline OpenMP code, so it needs -fopenmp to compile. It is not given to the linker: the symbols come from the
    libgomp that libtorch has loaded, and a second one would start a second pool of threads. clang's OpenMP code does not run on libgomp."""
    openmp = ["-fopenmp"] if platform == "linux" and "clang" not in compiler else []
    return [*CXX_FLAGS, *openmp]


def nvcc_flags(architectures: str, threads: str | None = None) -> list[str]:
    """torch adds its own -gencode flags (TORCH_CUDA_ARCH_LIST) as long as no flag here contains "arch"."""
    flags = [*NVCC_FLAGS, *([f"--threads={threads}"] if threads else [])]
    assert not any("arch" in flag for flag in flags), flags
    return flags + gencode_flags(architectures)


def gencode_flags(architectures: str) -> list[str]:
    """-gencode flags for a list such as 8.0;9.0+PTX. None, so that torch makes them, where it has other entries: names, 9.0a."""
    entries = [re.fullmatch(r"(\d+\.\d+)(\+PTX)?", entry) for entry in re.split(r"[;, ]+", architectures.strip())]
    if not all(entries):
        return []
    targets = []
    for entry in entries:
        number = entry[1].replace(".", "")
        generation = max((g for g in PTX_GENERATIONS if release(g) <= release(entry[1])), key=release, default=entry[1]).replace(".", "")
        targets.append(f"arch=compute_{generation},code=sm_{number}")
        if entry[2]:
            targets.append(f"arch=compute_{generation},code=compute_{generation}")
    return [f"-gencode={target}" for target in dict.fromkeys(targets)]


def find_sources(root: Path, cuda: bool) -> list[str]:
    """Every C++ and CUDA source under csrc, relative to `root`; two of them never share an object file."""
    files = [path.relative_to(root) for path in sorted((root / "csrc").rglob("*")) if path.suffix in (".cpp", ".cu")]
    if not cuda:
        files = [path for path in files if "cuda" not in path.parts]
    objects = [path.with_suffix(".o") for path in files]
    clashes = sorted({str(o) for o in objects if objects.count(o) > 1})
    assert not clashes, f"sources with the same object file: {clashes}"
    return [path.as_posix() for path in files]


def project_version(root: Path) -> str:
    """The public version: `version` of [tool.fused-critic] in pyproject.toml, where it is written once for Python, C++ and CMake."""
    return re.search(r'^version = "([^"]+)"', (root / "pyproject.toml").read_text(), re.MULTILINE)[1]


def wheel_version(version: str, torch_version: str, torch_cuda: str | None) -> str:
    """`version` with what the library is built for as its local version: 0.1.0+torch2.13.cpu, 0.1.0+torch2.14.cu130.

    `torch_cuda` is the CUDA version of torch, None for a library without CUDA. The minor version of torch is a segment of its own, since only
    a segment of digits alone is compared as a number (PEP 440): torch 2.9 comes before 2.13.
    """
    major, minor = release(torch_version)[:2]
    return f"{version}+torch{major}.{minor}.{'cu' + torch_cuda.replace('.', '') if torch_cuda else 'cpu'}"


def has_local_version(arguments: Sequence[str]) -> bool:
    """Whether the command line of setup.py builds a wheel to be handed on, whose name has to say what it was built for.

    Nothing else gets the local version: not the sdist, not an editable install, and no wheel whose metadata was announced before. pip always
    asks for that first, and would refuse an sdist 0.1.0 that turns into 0.1.0+torch2.13.cpu.
    """
    return "bdist_wheel" in arguments and "--dist-info-dir" not in arguments


def torch_requirement(torch_version: str | None) -> str:
    """What is needed at run time: of the sources (None) every supported torch, of a built library the minor version it was compiled against.

    A minor version changes the C++ interface, a patch release does not. The prefix match takes pre-releases and local versions too.
    """
    if torch_version is None:
        return f"torch>={'.'.join(map(str, MINIMUM_TORCH))}"
    return f"torch=={'.'.join(map(str, release(torch_version)[:2]))}.*"
