"""The benchmark suite: ``python -m benchmarks --help``; method, byte model and results in benchmarks/README.md."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# `python -m` puts the directory it is run from first on sys.path, where the source tree would shadow the installed
# package, and the tree has no compiled kernels. After an editable install it has them, and is what should be measured.
# A root that PYTHONPATH names stays as well: that is the user's own choice.
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT and not (ROOT / "spo_kernels/libspo_kernels.so").exists():
    del sys.path[0]

# Read when torch loads: its profiler, which counts memory here, otherwise writes two lines to stderr each time it runs.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
