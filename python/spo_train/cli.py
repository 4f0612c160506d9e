"""The console script `spo-train`; the commands themselves are in `spo_train.commands`."""

from __future__ import annotations

import importlib.util
import os
import sys

# Import names of the packages in the extra "train".
REQUIRED = ("click", "matplotlib", "safetensors", "sentencepiece", "tqdm")


def main() -> None:
    """Run the command line, or say what to install if packages are missing."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'spo-train needs {", ".join(missing)}: pip install "spo_kernels[train]"')
    # Sampling is a long row of small parallel regions. Threads that spin at the end of each region are several times
    # slower than sleeping ones on busy cores, and a third faster on idle ones. OpenMP reads this when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from spo_train.commands import cli

    cli()
