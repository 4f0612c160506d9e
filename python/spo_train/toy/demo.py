"""The whole job, small: pairs from the shipped reference model, SPO and DPO, win rates, a figure, a table, stories.

`DemoConfig` holds sizes, schedule and seed. The judge, the grammar and the objectives of the three alignments
(`ALIGNMENTS`) cannot be changed. A stage whose result is in the folder is skipped, and an interrupted alignment goes on
from its checkpoint.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spo_train.alignment import is_finished, run_alignment
from spo_train.config import AlignConfig, DemoConfig, EvaluateConfig, PairsConfig
from spo_train.evaluate import Evaluator
from spo_train.files import StrPath, read_json, read_jsonl, write_json, write_jsonl
from spo_train.pair_data import load_pairs
from spo_train.report import MAIN_COLUMNS, markdown_table, read_run, read_runs, write_report
from spo_train.sampling import Text
from spo_train.toy.judge import story_judge
from spo_train.toy.make_pairs import make_pairs
from spo_train.toy.reference import load_reference

SETTINGS_FILE, PAIRS_FILE, REFERENCE_FILE = "demo.json", "pairs.jsonl", "reference.jsonl"
RUNS_FOLDER, REPORT_FOLDER = "runs", "report"

# Settings of each alignment, by the name of its folder. SPO has the settings of the paper's Appendix B, but draws 16 KL
# samples, as many as the default batch has pairs; the paper draws a quarter of its batch. DPO runs with the usual beta
# 0.1, and with 0.3, which did best in a pilot.
ALIGNMENTS: dict[str, dict[str, Any]] = {
    "spo": {"method": "spo", "alpha": 0.1, "beta": 0.03, "weight": "soft", "gamma": 0.1, "kl_samples": 16},
    "dpo-0.1": {"method": "dpo", "beta": 0.1},
    "dpo-0.3": {"method": "dpo", "beta": 0.3},
}


def run_demo(
    out: StrPath,
    config: DemoConfig,
    *,
    device: str = "cpu",
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Run the demo in the folder `out`, or the part of it that is not done yet.

    Args:
        out: the demo's folder.
        config: sizes, schedule and seed.
        device: where the models run, as torch names it. A resumed demo may use another one.
        fresh: remove an earlier demo from `out` first; other files there stay.
        say: takes each line of the demo's output.

    Returns:
        The files of the report.

    Raises:
        ValueError: `out` holds a demo with other settings.
        RunError, OSError: see `spo_train.run.run`.
    """
    start, out = time.perf_counter(), Path(out)
    _prepare(out, config, fresh)
    reference, tokenizer = load_reference(device)
    judge = story_judge()

    pairs_file = out / PAIRS_FILE
    say(f"[1/6] pairs: {config.pairs} x 2 stories from the reference, judged in both orders and filtered")
    if not pairs_file.exists():
        made = make_pairs(reference, tokenizer, pairs_file, PairsConfig(pairs=config.pairs, seed=config.seed))
        say(
            f"      kept {made.kept} ({made.keep_rate:.0%}) and {made.repaired_kept} of the same stories paired anew; "
            f"{made.agreement:.0%} agree with the judge without its noise"
        )
    pairs, _ = load_pairs(pairs_file, tokenizer, max_length=reference.max_length)

    say(f"[2/6] reference: {config.reference_samples} stories to compare with")
    evaluator = Evaluator(
        reference,
        tokenizer,
        EvaluateConfig(samples=config.samples, reference_samples=config.reference_samples, seed=1000 + config.seed),
        judge=judge,
        reference_texts=[Text.from_record(record) for record in read_jsonl(out / REFERENCE_FILE)] or None,
    )
    write_jsonl(out / REFERENCE_FILE, [text.record() for text in evaluator.reference_texts])

    folders = [out / RUNS_FOLDER / name for name in ALIGNMENTS]
    for number, (folder, settings) in enumerate(zip(folders, ALIGNMENTS.values(), strict=True), start=3):
        if not is_finished(folder):
            # The policy starts as a copy of the reference.
            policy, _ = load_reference(device)
            run_alignment(
                policy,
                reference,
                tokenizer,
                pairs,
                AlignConfig(
                    **settings,
                    steps=config.steps,
                    warmup_steps=config.warmup_steps,
                    batch_size=config.batch_size,
                    seed=config.seed,
                ),
                folder,
                evaluator=evaluator,
                about={"model": "shipped reference", "pairs": PAIRS_FILE},
                resume=True,
                checkpoint_every=config.evaluate_every,
                evaluate_every=config.evaluate_every,
            )
        done = read_run(folder)
        say(f"[{number}/6] {done.label}: win rate {done.last['win_rate']:.1%} after {done.last['step']} steps")

    runs = read_runs(folders)
    files = write_report(runs, out / REPORT_FOLDER)
    say(f"[6/6] report, after {time.perf_counter() - start:.0f} s in all:")
    for file in files:
        say(f"      {file}")
    say("")
    say(markdown_table(runs, MAIN_COLUMNS))
    return files


def _prepare(out: Path, config: DemoConfig, fresh: bool) -> None:
    """Remove an earlier demo if asked to, refuse one with other settings, and write the settings of this one."""
    settings_file = out / SETTINGS_FILE
    if settings_file.exists() and fresh:
        for name in (PAIRS_FILE, REFERENCE_FILE, SETTINGS_FILE):
            (out / name).unlink(missing_ok=True)
        for name in (*(f"{RUNS_FOLDER}/{run}" for run in ALIGNMENTS), REPORT_FOLDER):
            shutil.rmtree(out / name, ignore_errors=True)
    if settings_file.exists():
        earlier, ours = read_json(settings_file), config.record()
        differing = [f"{key}={earlier.get(key)}, now {ours[key]}" for key in ours if earlier.get(key) != ours[key]]
        if differing:
            raise ValueError(
                f"{out} holds a demo with {'; '.join(differing)}: choose another folder, or start over with --fresh"
            )
    write_json(settings_file, config.record())
