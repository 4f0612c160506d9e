"""The least time the ops could take on GPUs that are not here: bytes of the byte model over the memory's bandwidth."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import report
from benchmarks.ops import OPS, Case, Workload

# Bytes per second of the memory, by the makers' data sheets.
BANDWIDTH = {"A100 80GB": 2.04e12, "H100 SXM": 3.35e12, "H200": 4.8e12, "B200": 8.0e12, "MI300X": 5.3e12}

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
