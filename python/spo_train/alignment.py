"""A whole alignment: models and pairs in, the folder of a run with the aligned model out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import spo_kernels
from spo_train.align import Aligner
from spo_train.config import AlignConfig
from spo_train.evaluate import Evaluator
from spo_train.files import (
    MODEL_FOLDER,
    RUN_FILE,
    STORIES_FILE,
    StrPath,
    read_json,
    write_json,
    write_jsonl,
)
from spo_train.pair_data import PairDataset
from spo_train.protocol import TextTokenizer, TrainableModel
from spo_train.ranks import Ranks
from spo_train.run import run

# Texts before and after alignment that a run keeps for its report.
STORIES = 8


def run_alignment(
    policy: TrainableModel,
    reference: TrainableModel,
    tokenizer: TextTokenizer,
    pairs: PairDataset,
    config: AlignConfig,
    out: StrPath,
    *,
    evaluator: Evaluator | None = None,
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
    restart: bool = False,
    checkpoint_every: int = 100,
    evaluate_every: int = 100,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> None:
    """Align a model: train it in the folder `out`, write it to `out/model`, and keep texts from before and after.

    `out/run.json` holds the settings, and says whether the run is finished.

    Args:
        policy: what is trained, in place.
        reference, pairs, config: see `Aligner`.
        tokenizer: of both models; saved with the model.
        out, resume, restart, checkpoint_every, evaluate_every, progress, ranks: see `run`.
        evaluator: evaluates during training; None trains only.
        about: further facts for `run.json`, for instance where model and pairs came from.

    Raises:
        ValueError: the tokenizer does not fit both models.
        Everything that `run` raises.
    """
    out = Path(out)
    tokenizer.check_fits(policy, "the model")
    tokenizer.check_fits(reference, "the reference")
    ranks = ranks or Ranks()
    aligner = Aligner(policy, reference, pairs, config, ranks)
    record = {
        **(about or {}),
        "config": config.record(),
        "evaluate": evaluator.config.record() if evaluator else None,
        "pairs_used": len(pairs),
        "versions": {"torch": torch.__version__, "spo_kernels": spo_kernels.__version__},
        "threads": torch.get_num_threads(),
        "processes": ranks.size,
        "finished": False,
    }

    def on_start() -> None:
        if restart:
            (out / STORIES_FILE).unlink(missing_ok=True)
        write_json(out / RUN_FILE, record)

    run(
        aligner,
        out,
        resume=resume,
        restart=restart,
        checkpoint_every=checkpoint_every,
        evaluate_every=evaluate_every,
        evaluate=evaluator.hook(policy) if evaluator else None,
        on_start=on_start,
        progress=progress,
        ranks=ranks,
    )
    if not ranks.is_first:
        return
    policy.save(out / MODEL_FOLDER)
    tokenizer.save_in(out / MODEL_FOLDER)
    if evaluator is not None:
        stories = evaluator.before_and_after(policy, STORIES)
        write_jsonl(out / STORIES_FILE, ({"before": b.record(), "after": a.record()} for b, a in stories))
    write_json(out / RUN_FILE, record | {"finished": True})


def is_finished(out: Path) -> bool:
    """Return whether the folder holds a run that `run_alignment` brought to its end."""
    file = out / RUN_FILE
    return file.is_file() and bool(read_json(file).get("finished"))
