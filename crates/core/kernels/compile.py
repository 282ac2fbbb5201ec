#!/usr/bin/env python3
"""Makes sums.ptx of sums.cu by NVRTC, which needs no GPU; with --check, fails where it is not what sums.cu gives.

Run `make kernels`, or `make check-kernels`: they fetch the wheel nvidia-cuda-nvrtc-cu11, and give its folder.
"""

import ctypes
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
# The oldest architecture that it is made for: drivers compile it for theirs.
OPTIONS = [b"--gpu-architecture=compute_70"]


def compiled(library: ctypes.CDLL, source: bytes) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()

    def text(what: str) -> bytes:
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, buffer)
        return buffer.value

    library.nvrtcCreateProgram(ctypes.byref(program), source, b"sums.cu", 0, None, None)
    options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
    if library.nvrtcCompileProgram(program, len(OPTIONS), options):
        sys.exit(text("ProgramLog").decode())
    return text("PTX")


def main() -> None:
    folder, check = pathlib.Path(sys.argv[1]), "--check" in sys.argv[2:]
    library = ctypes.CDLL(str(next(folder.rglob("libnvrtc.so*"))))
    target, made = HERE / "sums.ptx", compiled(library, (HERE / "sums.cu").read_bytes())
    if not check:
        target.write_bytes(made)
    elif target.read_bytes() != made:
        sys.exit(f"{target} is not made of sums.cu as it is: run `make kernels`")


if __name__ == "__main__":
    main()
