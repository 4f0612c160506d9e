"""What GPUs that are not here could do at best: bytes over the memory's bandwidth, products at their full rate."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness import results as report
from benchmarks.workloads.row_ops import OPS, Case, Workload

# Bytes per second of the memory, by the makers' data sheets.
BANDWIDTH = {"A100 80GB": 2.04e12, "H100 SXM": 3.35e12, "H200": 4.8e12, "B200": 8.0e12, "MI300X": 5.3e12}

# bfloat16 operations per second of dense products, by the same sheets.
OPERATIONS = {"A100 80GB": 312e12, "H100 SXM": 989e12, "H200": 989e12, "B200": 2250e12, "MI300X": 1307e12}

WORKLOADS = (
    Workload("token_logps", "fwd"),
    Workload("token_logps", "fwd_bwd"),
    Workload("token_kl", "fwd"),
    Workload("token_kl", "fwd_bwd"),
    Workload("kl_loss", "fwd_bwd"),
)


def markdown(cases: Sequence[Case]) -> str:
    """A row a workload and case: its bytes, and microseconds on each GPU at its full bandwidth."""
    rows = []
    for case in cases:
        for workload in WORKLOADS:
            traffic = OPS[workload.op].bytes_moved(workload.pass_name, case.shape, case.dtype)
            moved = traffic.read + traffic.update
            times = [f"{1e6 * moved / bandwidth:.0f}" for bandwidth in BANDWIDTH.values()]
            rows.append([str(workload), str(case), f"{moved / 1e9:.2f}", *times])
    header = ["op and pass", "case", "GB", *(f"{name}, us" for name in BANDWIDTH)]
    return report.markdown_table(header, rows, 2)


def head_markdown(widths: Sequence[int]) -> str:
    """A row a width H of the head: the rate its product must reach, of the library's, where it keeps logits to itself.

    A kernel that takes the statistics of bfloat16 logits from the product saves writing 2 bytes a logit and reading
    them again; against ``2 H`` operations a logit, both at the sheet's rates. Where a tile of logits stays in the L2
    cache it saves less, down to nothing but launches: then the rate needed comes to 100 %.
    """
    rows = []
    for width in widths:
        shares = []
        for name, bandwidth in BANDWIDTH.items():
            product = 2 * width / OPERATIONS[name]
            shares.append(f"{product / (product + 4 / bandwidth):.0%}")
        rows.append([str(width), *shares])
    return report.markdown_table(["H", *BANDWIDTH], rows, 1)
