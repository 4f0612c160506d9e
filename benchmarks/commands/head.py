"""``head``: the pair loss and the KL from hidden states and a weight, at one size or at the sizes of real models."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from benchmarks.commands.arguments import add_common, count, open_bench
from benchmarks.harness.bench import Bench
from benchmarks.harness.results import Report, markdown_table
from benchmarks.peers.head import NAMES, OURS, PROVIDERS
from benchmarks.workloads.head import DTYPES, PASSES, HeadRow, LossRunner, Size

HELP = "time the head: the pair loss and the KL from hidden states and weight"
DEFAULT_PAIRS = 8

# Heads of real models, (V, H).
MODELS = {
    "Llama 2 7B": (32000, 4096),
    "SmolLM 135M": (49152, 576),
    "Llama 3.2 1B": (128256, 2048),
    "Qwen2.5 0.5B": (151936, 896),
    "Gemma 3 1B": (262144, 1152),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "SPO's pair loss and the token KL from hidden states and a weight, against eager and the peers."
    )
    add_common(parser)
    parser.add_argument("--pairs", type=count, help=f"pairs P (default: {DEFAULT_PAIRS}; 1 with --models)")
    parser.add_argument(
        "--tokens", type=count, help="tokens T a sequence, which gives N = 2 P T rows (default: 256; 128 with --models)"
    )
    parser.add_argument("--hidden", type=count, default=768)
    parser.add_argument("--vocabulary", type=count, default=32000)
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["float32", "bfloat16"], metavar="DTYPE")
    parser.add_argument(
        "--losses", choices=PROVIDERS, nargs="+", default=[*PROVIDERS], metavar="LOSS", help="pairs, kl"
    )
    parser.add_argument("--passes", choices=PASSES, nargs="+", default=[*PASSES], metavar="PASS", help="fwd, fwd_bwd")
    parser.add_argument("--providers", choices=NAMES, nargs="+", metavar="NAME", help="default: all")
    parser.add_argument(
        "--models",
        nargs="*",
        choices=MODELS,
        metavar="MODEL",
        help=f"heads of real models, in place of --vocabulary and --hidden: {', '.join(MODELS)} (without names: all)",
    )


@dataclass(frozen=True)
class _Plan:
    """What to measure: every loss and pass, at every size and dtype."""

    sizes: dict[str, Size]  # by name of the model
    dtypes: list[str]
    losses: list[str]
    passes: list[str]
    providers: list[str]


def run(options: argparse.Namespace) -> int:
    providers = options.providers or [*NAMES]
    for loss in options.losses:
        if not set(providers) & PROVIDERS[loss].keys():
            raise ValueError(f"none of {', '.join(sorted(providers))} has the loss {loss!r}: leave it out of --losses")
    real_models = options.models is not None
    if real_models:
        # At a large model's size a call takes seconds even for 256 rows, and eager takes gigabytes.
        pairs, tokens = options.pairs or 1, options.tokens or 128
        heads = {name: MODELS[name] for name in options.models or MODELS}
    else:
        pairs, tokens = options.pairs or DEFAULT_PAIRS, options.tokens or 256
        heads = {"head": (options.vocabulary, options.hidden)}
    sizes = {name: Size(pairs, tokens, hidden, vocabulary) for name, (vocabulary, hidden) in heads.items()}
    plan = _Plan(sizes, options.dtypes, options.losses, options.passes, providers)

    bench = open_bench(options)
    report = Report(bench, "models" if real_models else "head", HeadRow)
    rows = _measure(plan, bench, report)
    if real_models:
        report.write_page("Heads of real models", _models(rows))
    else:
        report.write_page("The head", _one_size(rows))
    return report.exit_status()


def _measure(plan: _Plan, bench: Bench, report: Report) -> list[HeadRow]:
    rows: list[HeadRow] = []
    for name, size in plan.sizes.items():
        for dtype in plan.dtypes:
            for loss in plan.losses:
                print(f"{name}: [{size.vocabulary}, {size.hidden}] {dtype}, {loss}", flush=True)
                runner = LossRunner(size, dtype, loss, bench.settings, plan.providers)
                for pass_name in plan.passes:
                    measured = runner.run(pass_name)
                    report.add(measured)
                    rows += measured
    return rows


def _models(rows: list[HeadRow]) -> str:
    """A line for each model, loss and pass: the fastest of ours, and the peers' times as multiples of its time."""
    groups: dict[tuple[int, int, str, str, str], dict[str, HeadRow]] = {}
    for row in rows:
        key = (row.vocabulary, row.hidden, row.dtype, row.loss, row.pass_name)
        groups.setdefault(key, {})[row.provider] = row
    models = {size: name for name, size in MODELS.items()}
    peers = [name for name in NAMES if name not in OURS and any(name in group for group in groups.values())]
    lines: list[list[str]] = []
    for (vocabulary, hidden, dtype, loss, pass_name), group in groups.items():
        times = {name: row.timing.wall_ms for name, row in group.items() if row.timing is not None}
        name = min(OURS & times.keys(), key=times.__getitem__, default=None)
        if name is None:
            continue
        best = group[name]
        assert best.timing is not None and best.memory is not None
        cells = [models[vocabulary, hidden], f"{vocabulary} x {hidden}", dtype, loss, pass_name, name]
        cells += [best.timing.with_spread(".0f"), f"{best.over['products']:.2f}", f"{best.memory.extra_mib:.0f}"]
        cells += [_peer_cell(group.get(peer), times[name]) for peer in peers]
        lines.append(cells)
    header = ["model", "V x H", "dtype", "loss", "pass", "ours", "ms (p20-p80)", "÷ products alone", "peak MiB", *peers]
    title = (
        f"N = {rows[0].rows} rows ({rows[0].pairs} pairs). Peers' medians as multiples of the fastest of ours; bold: a "
        "peer wins. `chunked_nll` is a sum of log-probs, without pairs; wrong: beyond the correctness gate."
    )
    return f"{title}\n\n{markdown_table(header, lines, 6)}"


def _peer_cell(row: HeadRow | None, ours_ms: float) -> str:
    if row is None:
        return ""
    if row.timing is None:
        return row.status
    if row.status != "ok":
        return f"wrong ({row.timing.wall_ms:.0f} ms)"
    ratio = row.timing.wall_ms / ours_ms
    return f"{ratio:.2f}x" if ratio >= 1 else f"**{ratio:.2f}x**"


def _one_size(rows: list[HeadRow]) -> str:
    first = rows[0]
    title = (
        f"N = {first.rows} rows ({first.pairs} pairs), H = {first.hidden}, V = {first.vocabulary}. `chunked_nll` is a "
        "sum of log-probs, without pairs. A peer beyond the correctness gate takes part in no ratio."
    )
    header = [
        "loss",
        "pass",
        "head",
        "dtype",
        "ms (p20-p80)",
        "÷ eager",
        "÷ products alone",
        "products",
        "share of their peak",
        "peak MiB",
        "loss error",
        "gradient error",
    ]
    return f"{title}\n\n{markdown_table(header, [_line(row) for row in rows], 4)}"


def _line(row: HeadRow) -> list[str]:
    case = [row.loss, row.pass_name, row.provider, row.dtype]
    if row.timing is None:
        return [*case, row.status, *[""] * 7]
    memory = "" if row.memory is None else f"{row.memory.extra_mib:.0f}"
    errors = [f"{row.error['loss']:.1e}", f"{max(row.error['hidden'], row.error['weight']):.1e}"]
    if row.status != "ok":
        return [*case, f"{row.timing.with_spread('.0f')}, {row.status}", "", "", str(row.units), "", memory, *errors]
    return [
        *case,
        row.timing.with_spread(".0f"),
        f"{row.over['eager']:.2f}" if "eager" in row.over else "",
        f"{row.over['products']:.2f}",
        str(row.units),
        f"{row.peak_share:.2f}",
        memory,
        *errors,
    ]
