"""Command line: python -m fused_critic info, python -m fused_critic check, python -m fused_critic doctor."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from ._info import collect_info
from .check import command
from .integrations import _doctor


def format_info(info: dict[str, Any]) -> str:
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

    command.add_parser(commands)
    _doctor.add_parser(commands)

    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
