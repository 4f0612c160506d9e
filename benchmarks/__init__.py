"""The benchmark suite: ``python -m benchmarks --help``; method, byte model and results in benchmarks/README.md."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# `python -m` puts the current directory first on sys.path. If that is the source tree, the tree would shadow the
# installed package, although it has no compiled kernels. So it is removed. After an editable install the tree has the
# kernels and is what should be measured. The user may also name the tree in PYTHONPATH, which stays as it is.
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT and not (ROOT / "spo_kernels/libspo_kernels.so").exists():
    del sys.path[0]

# The benchmarks count memory with torch's profiler, which otherwise writes two lines to stderr each time it runs. torch
# reads this variable when it loads.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
