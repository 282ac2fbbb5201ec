"""The `sllm-store` command."""

from __future__ import annotations

import os
import signal
import sys

from . import _native


def main() -> int:
    """Run the command with this process's arguments and give its exit code. It sees to Ctrl-C itself."""
    # A file or a socket that is opened must not become standard output or error, which lines are written to. Programs in
    # Rust see to that before `main`, which this one does not have.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    # Python's own handler would be told too, and raise KeyboardInterrupt when all is done.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _native.run_cli(sys.argv)
