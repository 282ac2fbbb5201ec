"""The `sllm-store` command."""

from __future__ import annotations

import sys

from . import _native


def main() -> int:
    """Run the command with this process's arguments and give its exit code. It sees to Ctrl-C itself."""
    return _native.run_cli(sys.argv)
