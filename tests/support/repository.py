"""Where the repository is, and its `benchmarks` package, which is not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def import_benchmarks() -> None:
    """Make `import benchmarks` work. The root stays off sys.path, where its unbuilt spo_kernels would come first."""
    spec = importlib.util.spec_from_file_location("benchmarks", ROOT / "benchmarks/__init__.py")
    assert spec is not None and spec.loader is not None
    package = sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
