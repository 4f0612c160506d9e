"""The console script `spo-train`; the commands themselves are in `spo_train.commands`."""

from __future__ import annotations

import importlib.util
import sys

# Import names of what the extra "train" brings.
REQUIRED = ("click", "matplotlib", "safetensors", "sentencepiece", "tqdm")


def main() -> None:
    """Runs the command line; says what to install when packages are missing."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'spo-train needs {", ".join(missing)}: pip install "spo_kernels[train]"')
    from spo_train.commands import cli

    cli()
