#!/usr/bin/env python3
"""Makes sums.sm_*.cubin of sums.cu by NVRTC, which needs no GPU; with --check, fails where they are not what sums.cu gives.

Run `make kernels`, or `make check-kernels`: they fetch the wheel nvidia-cuda-nvrtc-cu12, and give its folder.
"""

import ctypes
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
# What is made for one runs on later ones of the same generation (the number without its last digit) too. Code for all
# (PTX) would be compiled by the driver in the process that loads: 40 to 140 ms, and a process that exits meanwhile crashes.
ARCHITECTURES = (75, 80, 90, 100, 120)


def compiled(library: ctypes.CDLL, source: bytes, architecture: int) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()

    def output(what: str) -> bytes:
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    library.nvrtcCreateProgram(ctypes.byref(program), source, b"sums.cu", 0, None, None)
    options = (ctypes.c_char_p * 1)(b"--gpu-architecture=sm_%d" % architecture)
    if library.nvrtcCompileProgram(program, len(options), options):
        sys.exit(output("ProgramLog").decode())
    return output("CUBIN")


def main() -> None:
    folder, check = pathlib.Path(sys.argv[1]), "--check" in sys.argv[2:]
    library = ctypes.CDLL(str(next(folder.rglob("libnvrtc.so*"))))
    for architecture in ARCHITECTURES:
        target = HERE / f"sums.sm_{architecture}.cubin"
        made = compiled(library, (HERE / "sums.cu").read_bytes(), architecture)
        if not check:
            target.write_bytes(made)
        elif target.read_bytes() != made:
            sys.exit(f"{target} is not made of sums.cu as it is: run `make kernels`")


if __name__ == "__main__":
    main()
