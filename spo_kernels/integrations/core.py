"""The parts of an SPO step for any training loop: sampling, the buffer of samples, the loss of a micro-batch.

    attach_head(model)
    attach_head(reference)
    sampler, special = HFSampler(model, tokenizer), SpecialTokens.of(tokenizer, model)
    buffer = KLBuffer(prompts, sampler, Reference(reference), special, samples=32, every=8, device=model.device)
    spo = SPOStep(SPOSettings(alpha=0.1, beta=0.03), buffer)
    for step, window in enumerate(windows):  # a window: the micro-batches of an optimizer step, each `Pairs`
        spo.begin(model, window, step)
        for pairs in window:
            loss, metrics = spo(model, pairs)
            (loss / len(window)).backward()
        optimizer.step()

`examples/plain_loop.py` is such a loop. The pairs and samples of a micro-batch go through the model in one forward.
The loop must look for a loss of NaN itself. A checkpoint needs `SPOStep.state_dict` besides model and optimizer.
"""

from spo_kernels.integrations.buffer import KLBuffer, KLDraw, Reference
from spo_kernels.integrations.context import context_sums
from spo_kernels.integrations.head import attach_head
from spo_kernels.integrations.rows import Pairs, Rows, Samples, join_rows
from spo_kernels.integrations.sampling import HFSampler, Sampler, SpecialTokens
from spo_kernels.integrations.step import MetricSums, SPOSettings, SPOStep, StepResult

__all__ = [
    "HFSampler",
    "KLBuffer",
    "KLDraw",
    "MetricSums",
    "Pairs",
    "Reference",
    "Rows",
    "SPOSettings",
    "SPOStep",
    "Sampler",
    "Samples",
    "SpecialTokens",
    "StepResult",
    "attach_head",
    "context_sums",
    "join_rows",
]
