"""Arguments that several commands share, and the bench that is set up from them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.harness.bench import Bench, Settings, environment, set_simd_level
from spo_kernels import backends

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DEFAULT_OUT = ROOT / "out" / "benchmarks"


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) != 2 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be NxV, such as 4096x32000, got {text!r}")
    return sizes


def add_common(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that measures in its own process."""
    parser.add_argument(
        "--repeats", type=count, default=7, help="timed rounds of a case (default: 7); more if calls are short"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=count, help="CPU threads (default: torch's)")
    parser.add_argument("--simd", choices=("portable", "avx2", "avx512"), help="SIMD level of ours (default: best)")
    add_out(parser, "where results go (default: out/benchmarks)")


def add_out(parser: argparse.ArgumentParser, meaning: str = "default: out/benchmarks") -> None:
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=meaning)


def open_bench(options: argparse.Namespace) -> Bench:
    """The bench for parsed arguments. ``options.command_line`` holds the arguments as they were given."""
    settings, simd = settings_and_simd(options)
    return Bench(settings, environment(options.command_line, settings.device, simd), options.out)


def settings_and_simd(options: argparse.Namespace) -> tuple[Settings, str]:
    """Set device, threads and SIMD level. Returns settings and level; the level is empty without our CPU kernels."""
    device = options.device
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda needs a GPU that this torch can use")
        device = torch.device("cuda", device.index or 0)  # set_device needs an index
        torch.cuda.set_device(device)  # events and streams belong to the current device
    if options.threads:
        torch.set_num_threads(options.threads)
    simd = ""
    if options.simd:
        _, simd = set_simd_level(options.simd)
    elif device.type == "cpu" and backends.active("cpu") == "cpu":
        simd = backends.cpu.load().simd_level()
    return Settings(device, torch.get_num_threads(), options.repeats), simd
