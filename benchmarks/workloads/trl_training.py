"""One training run of TRL's ``DPOTrainer`` or of `SPOTrainer`, measured in a process of its own.

    python -m benchmarks.workloads.trl_training KIND FOLDER

prints a JSON object (`Measured`). The model is a Llama with random weights. SPO draws samples every `KL_EVERY` steps.
The measured steps hold one draw for each `KL_EVERY` of them, as a long run does.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KL_EVERY = 8
MEASURED_STEPS = 2 * KL_EVERY
WORDS = 400
# kind: settings of SPOConfig; None is TRL's DPOTrainer
KINDS: dict[str, dict[str, Any] | None] = {
    "TRL DPO": None,
    "SPO eager": {"head": "eager", "kl_reference": "logits"},
    "SPO logits": {"head": "logits", "kl_reference": "logits"},
    "SPO linear": {"head": "linear", "kl_reference": "hidden"},
}


@dataclass(frozen=True)
class Size:
    """Size of model and batch."""

    vocabulary: int = 32000
    hidden: int = 256
    layers: int = 4
    pairs: int = 2
    prompt: int = 24  # tokens at most
    response: int = 64  # tokens at most
    samples: int = 4
    new_tokens: int = 48


@dataclass(frozen=True)
class Measured:
    """CPU seconds are of all threads of the process."""

    kind: str
    step_seconds: float  # CPU seconds of a step, mean, draws included
    draw_seconds: float  # of them for drawing
    metrics_seconds: float  # of them for metrics
    peak_mib: float  # resident memory at its peak, above that after the imports
    buffer_mib: float  # what the buffer keeps of the reference
    loss: float  # of the last step


def run(kind: str, folder: Path, size: Size) -> Measured:
    import datasets
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import DPOConfig, DPOTrainer

    from spo_kernels.integrations.trl import SPOConfig, SPOTrainer

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    baseline = _resident_mib()
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i + 4 for i in range(size.vocabulary - 4)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=2 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    shared: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": size.pairs,
        "max_steps": 1 + MEASURED_STEPS,
        "logging_steps": KL_EVERY,
        "learning_rate": 1e-4,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    settings = KINDS[kind]
    draws = {"kl_every": KL_EVERY, "kl_samples": size.samples, "kl_max_new_tokens": size.new_tokens}
    args = DPOConfig(**shared) if settings is None else SPOConfig(**(shared | draws | settings))
    parts = {"step": _Clock(), "draw": _Clock(), "metrics": _Clock()}

    class Steps(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                for part in parts.values():
                    part.seconds = 0.0
                parts["step"].start()
            elif state.global_step == 1 + MEASURED_STEPS:
                parts["step"].stop()

    trainer: Any = (DPOTrainer if settings is None else SPOTrainer)(
        model=str(folder),
        args=args,
        train_dataset=datasets.Dataset.from_list(_pairs(size)),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    if settings is not None:
        trainer.spo.buffer.refresh = parts["draw"].timed(trainer.spo.buffer.refresh)
        trainer.spo._metrics = parts["metrics"].timed(trainer.spo._metrics)
        trainer.finish_window = parts["metrics"].timed(trainer.finish_window)
    trainer.train()
    return Measured(
        kind=kind,
        step_seconds=parts["step"].seconds / MEASURED_STEPS,
        draw_seconds=parts["draw"].seconds / MEASURED_STEPS,
        metrics_seconds=parts["metrics"].seconds / MEASURED_STEPS,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - baseline,
        buffer_mib=0.0 if settings is None else trainer.spo.buffer.draw.bytes() / 2**20,
        loss=[log["loss"] for log in trainer.state.log_history if "loss" in log][-1],
    )


class _Clock:
    """CPU seconds of the process."""

    def __init__(self) -> None:
        self.seconds, self._since = 0.0, 0.0

    def start(self) -> None:
        self._since = time.process_time()

    def stop(self) -> None:
        self.seconds += time.process_time() - self._since

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.start()
            try:
                return function(*args, **options)
            finally:
                self.stop()

        return call


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _pairs(size: Size) -> list[dict[str, str]]:
    chance = random.Random(0)

    def text(most: int) -> str:
        return " ".join(f"w{chance.randrange(WORDS)}" for _ in range(chance.randint(most // 2, most)))

    limits = {"prompt": size.prompt, "chosen": size.response, "rejected": size.response}
    rows = range(size.pairs * (1 + MEASURED_STEPS))
    return [{name: text(most) + " " for name, most in limits.items()} for _ in rows]


if __name__ == "__main__":
    sizes = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    print(json.dumps(asdict(run(sys.argv[1], Path(sys.argv[2]), Size(**sizes)))))
