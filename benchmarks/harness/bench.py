"""What the parts of one run share: where it measures and how often, on which machine, and where results go."""

from __future__ import annotations

import platform
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks import ROOT
from spo_kernels import __version__, backends


@dataclass(frozen=True)
class Settings:
    """Where to measure, and how often."""

    device: torch.device
    threads: int
    repeats: int


@dataclass(frozen=True)
class Environment:
    """The machine and the versions that were measured. They are the last columns of every row, as ``env_...``."""

    date: str
    commit: str
    command: str
    device: str
    cpu: str
    threads: int
    backend: str
    simd: str
    python: str
    torch: str
    spo_kernels: str
    system: str


@dataclass(frozen=True)
class Bench:
    """One run of a command."""

    settings: Settings
    environment: Environment
    out: Path  # folder of the results


def environment(arguments: Sequence[str], device: torch.device, simd: str) -> Environment:
    # --out is left out of the command that pages show: the folder says nothing about the results.
    pairs = pairwise(["", *arguments])
    shown = [argument for before, argument in pairs if "--out" not in (before, argument.partition("=")[0])]
    return Environment(
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=_commit(),
        command=shlex.join(["python", "-m", "benchmarks", *shown]),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        cpu=_cpu_model(),
        threads=torch.get_num_threads(),
        backend=backends.active(device),
        simd=simd,
        python=platform.python_version(),
        torch=metadata.version("torch"),
        spo_kernels=__version__,
        system=f"{platform.system()} {platform.machine()}",
    )


def machine_line(env: Environment) -> str:
    device = env.cpu if env.device == "cpu" else f"{env.device} ({env.cpu})"
    simd = f", SIMD level {env.simd}" if env.simd else ""
    return (
        f"{device}, {env.threads} threads, backend `{env.backend}`{simd}; torch {env.torch}, Python {env.python}; "
        f"commit `{env.commit}`, {env.date[:10]}; `{env.command}`."
    )


def set_simd_level(level: str) -> tuple[str, str]:
    """Set the SIMD level of the compiled CPU kernels; returns (level before, level now). ValueError without them."""
    from spo_kernels.backends import cpu

    if backends.active("cpu") != "cpu":
        raise ValueError(f"the SIMD level belongs to the compiled cpu backend, but {backends.active('cpu')} is active")
    control = cpu.load()
    before = control.simd_level()
    control.set_simd_level(level)
    return before, control.simd_level()


def _commit() -> str:
    """Short hash of the source tree, with ``-dirty`` where tracked files differ from it; ``unknown`` outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
