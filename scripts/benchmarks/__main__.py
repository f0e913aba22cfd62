"""``python scripts/benchmarks COMMAND``: each command is a module of this folder with a ``main(arguments)``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

COMMANDS = {
    "learned": "one step by a learned optimizer: beside Adam, and against the machine's matrix rate",
    "step": "one optimizer step: torch's, compiled, and fused, against the memory's bandwidth",
    "tasks": "a meta-gradient of many tasks: vmapped, against a Python loop over them",
    "unroll": "d meta-loss / d lr through training: ours and its peers, against plain training",
}


def main() -> int:
    """Run the command that the first argument names."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command not in COMMANDS:
        print("usage: scripts/bench COMMAND [--gpu] [--quick] [--json FILE]\n\ncommands:")
        for name, what in COMMANDS.items():
            print(f"  {name:8} {what}")
        return 0 if command in ("-h", "--help") else 2
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # metaopt, where it is not installed
    importlib.import_module(command).main(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
