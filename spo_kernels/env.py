"""``python -m spo_kernels.env``: what was built, what is selected for each device and why; for bug reports."""

from __future__ import annotations

import os
import platform

import torch

import spo_kernels
from spo_kernels import backends

VARIABLES = ("SPO_BACKEND", "SPO_SIMD", "TRITON_INTERPRET", "OMP_NUM_THREADS")


def report() -> dict[str, str]:
    """The facts as ``{name: value}``, in the order they are printed."""
    facts = {
        "spo_kernels": spo_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "backends available": ", ".join(backends.available()),
    }
    for device_type in backends.DISPATCH_KEYS:
        backend, reason = backends.selection(device_type)
        facts[f"backend on {device_type}"] = f"{backend or 'none'} ({reason})"
    if backends.selection("cpu").backend == "cpu":
        control = backends.cpu.load()
        facts["SIMD level"] = f"{control.simd_level()} (this CPU has {', '.join(control.simd_levels())})"
        facts |= {f"built with {name}": value for name, value in control.build_info().items()}
    facts["CUDA device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return facts | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def main() -> None:
    facts = report()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
