"""A run: the loop of a trainer in a folder, with metrics, evaluations, checkpoints, resume, and stop signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from spo_train.errors import RunInterruptedError
from spo_train.files import CHECKPOINT_FILE, EVALUATIONS_FILE, METRICS_FILE, StrPath
from spo_train.metrics import JsonlLog, progress_bar
from spo_train.ranks import Ranks

# Metrics that the progress bar shows, with their formats.
SHOWN = {"loss": ".3f", "accuracy": ".2f", "tokens_per_second": ".0f"}


class Trainer(Protocol):
    """What a run trains, one `update` a step.

    Attributes:
        name: what the progress bar says.
        steps: optimizer steps in all.
        step: optimizer steps done.
    """

    name: str
    steps: int
    step: int

    def update(self) -> dict[str, Any]:
        """Do one optimizer step; return its metrics, with `step` and `loss`."""
        ...

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        ...

    def restore(self, path: Path) -> None:
        """Take over the state of a checkpoint."""
        ...


def run(
    trainer: Trainer,
    out: StrPath,
    *,
    resume: bool = False,
    restart: bool = False,
    checkpoint_every: int = 100,
    evaluate_every: int = 100,
    evaluate: Callable[[int], dict[str, Any]] | None = None,
    on_start: Callable[[], None] | None = None,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> list[dict[str, Any]]:
    """Train to the last step, writing `metrics.jsonl`, `evaluations.jsonl` and `checkpoint.safetensors` to a folder.

    With `resume`, a run that was killed goes on from its last checkpoint. On the same machine and with the same number
    of threads it has the losses of an unbroken run. SIGINT and SIGTERM end a run after the current step, with a
    checkpoint. Of several processes the first one evaluates and writes the files; a signal to one stops all.

    Args:
        trainer: what to train.
        out: the run's folder.
        resume: go on from the checkpoint in `out`, or start if there is none yet.
        restart: start over, and replace the run in `out`.
        checkpoint_every: steps between two checkpoints; there is always one at the end.
        evaluate_every: steps between two calls of `evaluate`; there is always one before the first step and one at the
            end.
        evaluate: takes the number of steps done, returns a record for `evaluations.jsonl`. It must leave the global
            random state alone.
        on_start: called once, after a checkpoint is restored and before the first file is written. A run that is
            refused leaves `out` as it was.
        progress: whether to show a progress bar, if standard error is a terminal.
        ranks: the processes that share the run, all of which call; None for one. They need a common `out` to resume.

    Returns:
        The records of `metrics.jsonl`; in processes after the first one those of the steps that this call did.

    Raises:
        FileExistsError: `out` holds a run already, and neither `resume` nor `restart` is given.
        NonFiniteLossError: the loss or its gradient is NaN or infinite; the last checkpoint still stands.
        RunInterruptedError: a signal stopped the run, after a checkpoint.
        CheckpointError, OSError, ValueError: a file cannot be written or read, or belongs to another run.
    """
    out, ranks = Path(out), ranks or Ranks()
    checkpoint = out / CHECKPOINT_FILE
    keep = None
    if not (resume or restart):
        refuse_existing(out)
    elif resume and not restart and checkpoint.exists():
        trainer.restore(checkpoint)
        keep = trainer.step
    ranks.check_same("step of the checkpoint", trainer.step)
    if not ranks.is_first:
        on_start = evaluate = None
    elif restart:
        checkpoint.unlink(missing_ok=True)
        (out / EVALUATIONS_FILE).unlink(missing_ok=True)
    if on_start:
        on_start()
    resumed_at = trainer.step
    metrics = JsonlLog(out / METRICS_FILE if ranks.is_first else None, keep_to_step=keep)
    evaluations = None if evaluate is None else JsonlLog(out / EVALUATIONS_FILE, keep_to_step=keep)
    shown = progress and ranks.is_first
    evaluated = {record["step"] for record in evaluations.records} if evaluations else set()
    with (
        _stop_requests(force=ranks.size == 1) as stop_requested,
        progress_bar(total=trainer.steps, initial=resumed_at, desc=trainer.name, unit="step", shown=shown) as bar,
    ):
        while True:
            step, done, stopping = trainer.step, trainer.step >= trainer.steps, ranks.any(stop_requested())
            if stopping or (step > resumed_at and (done or step % checkpoint_every == 0)):
                trainer.save(checkpoint)
            if stopping:
                raise RunInterruptedError(f"stopped after step {step}; the checkpoint is {checkpoint}; resume to go on")
            if evaluate and evaluations and (done or step % evaluate_every == 0) and step not in evaluated:
                evaluations.write({"step": step, **evaluate(step)})
            if done:
                return metrics.records
            record = trainer.update()
            metrics.write(record)
            bar.set_postfix({name: f"{record[name]:{form}}" for name, form in SHOWN.items() if name in record}, False)
            bar.update()


def refuse_existing(out: Path) -> None:
    """Raise FileExistsError if the folder holds a run with a checkpoint."""
    if (out / CHECKPOINT_FILE).exists():
        raise FileExistsError(f"{out} already holds a run: resume it, restart it, or choose another folder")


@contextmanager
def _stop_requests(*, force: bool) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a request that the loop reads between steps.

    With `force` a second one acts at once. Processes of torchrun get the signal from the terminal and from torchrun,
    which kills them after 30 seconds.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, _frame: FrameType | None) -> None:
        requested.set()
        if force:
            signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, request)
    try:
        yield requested.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
