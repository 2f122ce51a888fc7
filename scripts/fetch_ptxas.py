#!/usr/bin/env python3
"""Puts NVIDIA's assembler `ptxas` into the repository's `.venv` when it is not there, and prints its path.

It comes from the package nvidia-cuda-nvcc; no GPU, driver or CUDA installation is needed. Tests that assemble PTX take
the path from PLEACH_PTXAS. A `ptxas` on the PATH or in PLEACH_PTXAS is preferred to fetching one.
"""

import os
import shutil
import sys

from fetch_models import ROOT, pip


def fetched():
    return next((ROOT / ".venv").glob("lib/python3*/site-packages/nvidia/*/bin/ptxas"), None)


def main():
    path = os.environ.get("PLEACH_PTXAS") or shutil.which("ptxas") or fetched()
    if path is None:
        print("fetching nvidia-cuda-nvcc", file=sys.stderr)
        pip("install", "--no-deps", "--only-binary", ":all:", "nvidia-cuda-nvcc==13.5.37")
        path = fetched()
    if path is None:
        sys.exit("the package nvidia-cuda-nvcc held no ptxas")
    print(path)


if __name__ == "__main__":
    main()
