"""The `sllm-store` command."""

from __future__ import annotations

import signal
import sys

from . import _native


def main() -> int:
    """Run the command with this process's arguments and give its exit code. It sees to Ctrl-C itself."""
    # Python's own handler would be told too, and raise KeyboardInterrupt when all is done.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _native.run_cli(sys.argv)
