"""What the command line says about the machine and the build."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import torch

from . import _C

NAMESPACE = "fused_critic"


def collect_info() -> dict[str, Any]:
    """Everything `info` prints, ready for JSON."""
    build = _C.build_info()
    warnings = []
    if torch.cuda.is_available() and build["cuda_version"] is None:
        warnings.append("CUDA tensors take the composite fallback: fused_critic was built without CUDA")
    return {
        "fused_critic": build["version"],
        "git_commit": build["git_commit"],
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_compiled_against": build["torch_version"],
        "torch_cuda": torch.version.cuda,
        "nvidia_driver": nvidia_driver(),
        "compiler": build["compiler"],
        "build_decision": build["build_decision"],
        "cuda_compiled_with": build["cuda_version"],
        "cuda_architectures": build["cuda_architectures"],
        "cpu_capability": torch.ops.fused_critic._cpu_capability(),
        "cpu_threads": torch.get_num_threads(),
        "devices": list_devices(),
        "operators": list_operators(),
        "warnings": warnings,
    }


def list_devices() -> list[str]:
    devices = [f"cpu: {platform.machine()}, {cpu_name()}"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            f"cuda:{index}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.1f} GiB"
        )
    return devices


def cpu_name() -> str:
    return _search_file("/proc/cpuinfo", r"^model name\s*:\s*(.+)$") or platform.processor() or "unknown"


def nvidia_driver() -> str | None:
    return _search_file("/proc/driver/nvidia/version", r"Kernel Module.*?\s(\d+\.[\d.]+)")


def _search_file(path: str, pattern: str) -> str | None:
    """The group of `pattern` in a file; None without such a file or line."""
    try:
        found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None


def list_operators() -> list[str]:
    """Schemas of the registered operators."""
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::"))
    schemas = []
    for name in names:
        operator, _, overload = name.removeprefix(f"{NAMESPACE}::").partition(".")
        schemas.append(str(getattr(getattr(torch.ops.fused_critic, operator), overload or "default")._schema))
    return schemas
