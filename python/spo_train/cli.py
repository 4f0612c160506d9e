"""The console script `spo-train`; the commands themselves are in `spo_train.commands`."""

from __future__ import annotations

import importlib.util
import os
import sys

# Import names of what the extra "train" brings.
REQUIRED = ("click", "matplotlib", "safetensors", "sentencepiece", "tqdm")


def main() -> None:
    """Runs the command line; says what to install when packages are missing."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'spo-train needs {", ".join(missing)}: pip install "spo_kernels[train]"')
    # Sampling is a long row of small parallel regions. On two cores with one other busy process, threads that spin at
    # the end of each took 10.7 s for 256 stories, threads that sleep 2.2 s; on idle cores 1.6 s and 2.5 s. Sleeping is
    # the safer default. OpenMP reads it when torch loads it, hence here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from spo_train.commands import cli

    cli()
