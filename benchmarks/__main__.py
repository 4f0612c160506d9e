"""Command line of the benchmark suite."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.commands import bars, floors, gpu, growth, levels
from benchmarks.commands import page as everything
from benchmarks.harness import results as report
from benchmarks.harness.case import CaseRunner, Settings, failures_of_ours, set_simd_level
from benchmarks.peers.row_ops import DEFAULT_PROVIDERS, PROVIDERS
from benchmarks.workloads import head, step
from benchmarks.workloads.row_ops import DEFAULT_CASES, WORKLOADS, Case, Workload

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DEFAULT_OUT = ROOT / "out" / "benchmarks"


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) != 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"must be NxV, such as 4096x32000, got {text!r}")
    return shape


def _head_shape(text: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"must be NxHxV, such as 4096x768x32000, got {text!r}")
    rows, hidden, vocabulary = map(int, parts)
    if rows % (2 * head.DEFAULT_PAIRS):
        raise argparse.ArgumentTypeError(f"N must be a multiple of {2 * head.DEFAULT_PAIRS}, got {text!r}")
    return rows, hidden, vocabulary


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def _workloads(text: str) -> list[Workload]:
    found = [workload for workload in WORKLOADS if text in (workload.op, str(workload))]
    if not found:
        known = ", ".join(map(str, WORKLOADS))
        raise argparse.ArgumentTypeError(f"must be an op or op.pass of {known}, got {text!r}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="spo_kernels against eager PyTorch, torch.compile and other peers. Method: benchmarks/README.md.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--repeats", type=_count, default=7, help="timed rounds a case, more where rounds are short")
    common.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (default: cpu)")
    common.add_argument("--threads", type=_count, help="CPU threads (default: torch's)")
    common.add_argument("--simd", choices=("portable", "avx2", "avx512"), help="SIMD level of ours (default: best)")
    common.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="where results go (default: out/benchmarks)"
    )

    ops = commands.add_parser(
        "ops",
        parents=[common],
        help="time every op and provider",
        description="Time ops: correctness gate, then interleaved calls. Exits with 1 if a result of ours is wrong.",
        epilog=f"Ops: {', '.join(map(str, WORKLOADS))}. Providers: {', '.join(PROVIDERS)}. "
        f"Cases when --shapes is not given: {'; '.join(map(str, DEFAULT_CASES))}.",
    )
    ops.add_argument("--shapes", type=_shape, nargs="+", metavar="NxV", help="rows x vocabulary, each in every dtype")
    ops.add_argument(
        "--dtypes",
        choices=DTYPES,
        nargs="+",
        metavar="DTYPE",
        help=f"{', '.join(DTYPES)} (default: those of the cases; float32 and bfloat16 for --shapes)",
    )
    ops.add_argument("--ops", type=_workloads, nargs="+", metavar="OP", help="op or op.pass (default: all)")
    ops.add_argument(
        "--providers", choices=PROVIDERS, nargs="+", metavar="NAME", help="default: all at the best SIMD level"
    )
    ops.add_argument("--scale", type=float, default=1.0, help="factor on the normal logits; 40 makes exp() denormal")
    ops.add_argument("--runs", type=_count, default=1, help="repeat everything; a row of the CSV for each run")

    steps = commands.add_parser(
        "step",
        parents=[common],
        help="time an SPO training step",
        description="An SPO training step of a small transformer, forward to optimizer, ours against eager PyTorch.",
    )
    step.add_arguments(steps, _count)

    heads = commands.add_parser(
        "head",
        parents=[common],
        help="time the head: the pair loss and the KL from hidden states and weight",
        description="SPO's pair loss and the token KL from hidden states and a weight, against eager and the peers.",
    )
    head.add_arguments(heads, _count)

    bar = commands.add_parser(
        "bars",
        parents=[common],
        help="measure the project's speed bars, pass or miss",
        description="The speed bars of the project: median and spread over runs, pass or miss.",
    )
    bar.add_argument("--runs", type=_count, default=5, help="runs to take median and spread of (default: 5)")
    bar.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="time that ratios compare")
    bar.add_argument("--shapes", type=_shape, nargs="+", metavar="NxV", help="instead of the bars' own shapes")
    bar.add_argument("--providers", choices=PROVIDERS, nargs="+", metavar="NAME", help="leave the others unmeasured")
    bar.add_argument(
        "--groups", choices=bars.GROUPS, nargs="+", default=[*bars.GROUPS], metavar="GROUP", help="ops, head, calls"
    )
    bar.add_argument(
        "--head-shape", type=_head_shape, default=(4096, 768, 32000), metavar="NxHxV", help="of the head's"
    )

    level = commands.add_parser(
        "levels",
        parents=[common],
        help="time the SIMD levels of the CPU kernels beside each other",
        description="Every SIMD level that this CPU has, in every dtype, beyond the caches and within them.",
    )
    level.add_argument("--shapes", type=_shape, nargs="+", default=[*levels.SHAPES], metavar="NxV")
    level.add_argument("--dtypes", choices=DTYPES, nargs="+", default=[*levels.DTYPES], metavar="DTYPE")

    grow = commands.add_parser(
        "growth",
        parents=[common],
        help="time and memory against rows, vocabulary and threads, in one figure",
        description="How time and memory of a row op and of the head grow with rows, vocabulary and threads.",
    )
    growth.add_arguments(grow, _count)

    every = commands.add_parser(
        "all",
        help="everything on benchmarks/README.md anew: tables and figures",
        description="Runs ops, step, head (of real models too), growth, levels and bars in turn and puts what they "
        "measured into the page, in place of all that stands between its result markers. "
        "Goes on after a failure and exits with 1; results of commands that ran are kept.",
    )
    everything.add_arguments(every)
    every.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="default: out/benchmarks")

    whole = commands.add_parser(
        "gpu",
        help="one report for those who have a GPU: tests, selfcheck, benchmarks",
        description="Runs the tests marked gpu, the selfcheck and the benchmarks, and writes one page about it. "
        "Exits with 1 if any of them failed.",
    )
    whole.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="default: cuda")
    whole.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="default: out/benchmarks")
    whole.add_argument(
        "--budget", type=_count, metavar="SECONDS", help="the most telling of it, in so much time (try 540)"
    )
    whole.add_argument("--quick", action="store_true", help="tiny sizes, to try the report itself; works with cpu too")
    whole.set_defaults(threads=None, simd=None, repeats=1)

    results = argparse.ArgumentParser(add_help=False)
    results.add_argument(
        "files", type=Path, nargs="*", metavar="FILE", help="CSVs of ops, pages of step and bars (default: the newest)"
    )
    results.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="where they are")
    plot = commands.add_parser("plot", parents=[results], help="draw speed-ups and bandwidth shares of ops CSVs")
    plot.add_argument("--save", type=Path, metavar="FILE", help="image to write (default: a new one under --out)")
    table = commands.add_parser("table", parents=[results], help="print results as markdown tables")
    table.add_argument(
        "--update",
        type=Path,
        nargs="*",
        metavar="PAGE",
        help="put them between the result markers of these pages (none named: benchmarks/README.md)",
    )
    floor = commands.add_parser("floors", help="what the ops and the head could do on GPUs, from data sheets alone")
    floor.add_argument("--shapes", type=_shape, nargs="+", default=[(8192, 32000), (8192, 128256), (8192, 151936)])
    floor.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    floor.add_argument("--widths", type=_count, nargs="+", default=[576, 768, 1024, 2048, 4096], metavar="H")
    return parser


def _settings(options: argparse.Namespace) -> tuple[Settings, str]:
    """Settings, and the SIMD level in use where our compiled CPU kernels run."""
    from spo_kernels import backends

    if options.device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda needs a GPU that this torch can use")
        options.device = torch.device("cuda", options.device.index or 0)  # set_device needs an index
        torch.cuda.set_device(options.device)  # events and streams are those of the current device
    if options.threads:
        torch.set_num_threads(options.threads)
    simd = ""
    if options.simd:
        _, simd = set_simd_level(options.simd)
    elif options.device.type == "cpu" and backends.active("cpu") == "cpu":
        simd = backends.cpu.load().simd_level()
    return Settings(options.device, torch.get_num_threads(), options.repeats), simd


def _cases(options: argparse.Namespace) -> list[Case]:
    dtypes = [DTYPES[name] for name in options.dtypes or ()]
    if options.shapes:
        wanted = dtypes or [torch.float32, torch.bfloat16]
        return [Case(shape, dtype, options.scale) for shape in options.shapes for dtype in wanted]
    cases = [case._replace(scale=options.scale) for case in DEFAULT_CASES if not dtypes or case.dtype in dtypes]
    if not cases:
        raise ValueError(f"--dtypes {' '.join(options.dtypes)} is in no default case: give --shapes as well")
    return cases


def run_levels(options: argparse.Namespace, environment: report.Environment, settings: Settings) -> int:
    cases = [Case(shape, DTYPES[name]) for shape in options.shapes for name in options.dtypes]
    return levels.run_levels(options, cases, environment, settings)


def run_ops(options: argparse.Namespace, environment: report.Environment, settings: Settings) -> int:
    workloads = [workload for group in options.ops or [WORKLOADS] for workload in group]
    providers = options.providers or DEFAULT_PROVIDERS
    writer = report.CsvWriter(report.output_path(options.out, "ops"), report.Row, environment)
    rows = []
    for run in range(options.runs):
        for case in _cases(options):
            runner = CaseRunner(case, settings, providers)
            for workload in workloads:
                print(f"\n{workload} {case}" + (f", run {run + 1} of {options.runs}" if options.runs > 1 else ""))
                measured = runner.run(workload, run)
                writer.write(measured)
                rows += measured
                for row in measured:
                    print("  " + _line(row), flush=True)
    print(f"\n{writer.path}")
    wrong = failures_of_ours(rows)
    for row in wrong:
        print(f"{row.op}.{row.pass_name} [{row.shape}] {row.dtype}: {row.provider} {row.status}", file=sys.stderr)
    return 1 if wrong else 0


def _line(row: report.Row) -> str:
    if row.wall_ms is None:
        return f"{row.provider:<14} {row.status}"
    spread = f"{row.wall_p20_ms:.3f}-{row.wall_p80_ms:.3f}"
    parts = [
        f"{row.provider:<14} {row.wall_ms:10.3f} ms ({spread}; CPU {row.cpu_ms:.3f})",
        f"{row.gb_per_s:6.1f} GB/s",
    ]
    if row.limit_share is not None:
        parts.append(f"{row.limit_share:.2f} of the limit")
    if row.extra_mib is not None:
        parts.append(f"{row.extra_mib:.1f} MiB extra")
    if row.over_ours is not None:
        parts.append(f"{row.over_ours:.2f}x ours")
    if row.over_ours_inplace is not None:
        parts.append(f"{row.over_ours_inplace:.2f}x in place")
    return "; ".join(parts)


def _measured(options: argparse.Namespace) -> tuple[list[report.Record], list[Path]]:
    """(rows of the ops CSVs, pages) of the files named, or of the newest of each kind under --out."""
    files = options.files
    if not files:
        kinds = ("ops-*.csv", "step-*.md", "head-*.md", "models-*.md", "growth-*.md", "levels-*.md", "bars-*.md")
        files = [found[-1] for kind in kinds if (found := sorted(options.out.glob(kind)))]
    tables, pages = ([file for file in files if file.suffix == suffix] for suffix in (".csv", ".md"))
    records = [record for table in tables for record in report.read_csv(table)]
    if any("provider" not in record or "op" not in record for record in records):
        raise ValueError("files must be CSVs that `python -m benchmarks ops` wrote, or the pages of step and bars")
    if not any(record["status"] == "ok" for record in records):
        raise ValueError(f"no timed op in {', '.join(map(str, tables)) or options.out}: run `python -m benchmarks ops`")
    return records, pages


def run_plot(options: argparse.Namespace) -> int:
    records, _ = _measured(options)
    target = options.save or report.output_path(options.out, "plot", ".png")
    report.plot(records, target)
    print(target)
    return 0


def run_table(options: argparse.Namespace) -> int:
    records, pages = _measured(options)
    text = "\n\n".join([report.ops_markdown(records), *(page.read_text().strip() for page in pages)])
    if options.update is None:
        print(text)
        return 0
    for page in options.update or [ROOT / "benchmarks" / "README.md"]:
        report.replace_results(page, text)
        print(page)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    try:
        if options.command in ("plot", "table"):
            return {"plot": run_plot, "table": run_table}[options.command](options)
        if options.command == "all":
            return everything.run_all(options)
        if options.command == "floors":
            print(floors.markdown([Case(shape, DTYPES[options.dtype]) for shape in options.shapes]), "", sep="\n")
            print(floors.head_markdown(options.widths))
            return 0
        settings, simd = _settings(options)
        environment = report.environment(arguments, options.device, simd)
        run = {
            "ops": run_ops,
            "bars": bars.run_bars,
            "step": step.run_step,
            "head": head.run_head,
            "growth": growth.run_growth,
            "levels": run_levels,
            "gpu": gpu.run_gpu,
        }[options.command]
        return run(options, environment, settings)
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
