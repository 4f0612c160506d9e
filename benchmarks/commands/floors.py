"""``floors``: what data sheets of GPUs allow: least times of row ops, and when a fused kernel of the head would win."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.commands.arguments import DTYPES, count, shape
from benchmarks.harness.results import markdown_table
from benchmarks.workloads.row_ops import OPS, REPRESENTATIVE_WORKLOADS, Case

HELP = "print what ops and head could reach on GPUs, from data sheets alone"

# Memory bandwidth in bytes per second, from the makers' data sheets.
BANDWIDTH = {"A100 80GB": 2.04e12, "H100 SXM": 3.35e12, "H200": 4.8e12, "B200": 8.0e12, "MI300X": 5.3e12}

# Operations per second of dense products in bfloat16, from the same sheets.
OPERATIONS = {"A100 80GB": 312e12, "H100 SXM": 989e12, "H200": 989e12, "B200": 2250e12, "MI300X": 1307e12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(8192, 32000), (8192, 128256), (8192, 151936)])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--widths", type=count, nargs="+", default=[576, 768, 1024, 2048, 4096], metavar="H")


def run(options: argparse.Namespace) -> int:
    print(_ops([Case(size, DTYPES[options.dtype]) for size in options.shapes]), "", sep="\n")
    print(_head(options.widths))
    return 0


def _ops(cases: Sequence[Case]) -> str:
    """A row for each workload and case: its bytes, and microseconds on each GPU at full bandwidth."""
    rows = []
    for case in cases:
        for workload in REPRESENTATIVE_WORKLOADS:
            traffic = OPS[workload.op].bytes_moved(workload.pass_name, case.shape, case.dtype)
            moved = traffic.read + traffic.update
            times = [f"{1e6 * moved / bandwidth:.0f}" for bandwidth in BANDWIDTH.values()]
            rows.append([str(workload), str(case), f"{moved / 1e9:.2f}", *times])
    header = ["op and pass", "case", "GB", *(f"{name}, us" for name in BANDWIDTH)]
    return markdown_table(header, rows, 2)


def _head(widths: Sequence[int]) -> str:
    """A row for each width H of the head: the share of the library's rate that a fused kernel must reach to win.

    The fused kernel computes the product and takes the statistics of the bfloat16 logits from it. It needs the
    product's ``2 H`` operations a logit, and saves writing 2 bytes a logit and reading them again. Both count at the
    data sheet's rates. If a tile of logits stays in the L2 cache, the kernel saves less. At worst it saves launches
    alone, and must reach 100 %.
    """
    rows = []
    for width in widths:
        shares = []
        for name, bandwidth in BANDWIDTH.items():
            product = 2 * width / OPERATIONS[name]
            shares.append(f"{product / (product + 4 / bandwidth):.0%}")
        rows.append([str(width), *shares])
    return markdown_table(["H", *BANDWIDTH], rows, 1)
