"""Command line: python -m fused_critic info."""

from __future__ import annotations

import argparse
import json
import platform
import sys

import torch

from . import _C

NAMESPACE = "fused_critic"


def collect_info() -> dict:
    """Everything `info` prints, ready for JSON."""
    build = _C.build_info()
    warnings = []
    if build["torch_version"] != torch.__version__:
        warnings.append(f"compiled against torch {build['torch_version']} but running with torch {torch.__version__}: rebuild fused_critic")
    if torch.cuda.is_available() and build["cuda_version"] is None:
        warnings.append("CUDA tensors take the composite fallback: fused_critic was built without CUDA")
    return {
        "fused_critic": build["version"],
        "git_commit": build["git_commit"],
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_compiled_against": build["torch_version"],
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
    devices = [f"cpu: {platform.machine()}"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.append(f"cuda:{index}: {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    return devices


def list_operators() -> list[str]:
    """Schemas of the registered operators."""
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::"))
    schemas = []
    for name in names:
        operator, _, overload = name.removeprefix(f"{NAMESPACE}::").partition(".")
        schemas.append(str(getattr(getattr(torch.ops.fused_critic, operator), overload or "default")._schema))
    return schemas


def format_info(info: dict) -> str:
    lines = []
    for key, value in info.items():
        label = key.replace("_", " ")
        if isinstance(value, list):
            if value:
                lines += [f"{label}:", *(f"  {item}" for item in value)]
        else:
            lines.append(f"{label}: {'none' if value is None else value}")
    return "\n".join(lines)


def run_info(arguments: argparse.Namespace) -> int:
    info = collect_info()
    print(json.dumps(info, indent=2) if arguments.json else format_info(info))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_critic")
    commands = parser.add_subparsers(title="commands", required=True)

    info = commands.add_parser("info", help="versions, how the library was built, what it registered and what it runs on")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=run_info)

    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
