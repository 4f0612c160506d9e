"""SPO with TRL, the models sharded by FSDP2.

    accelerate launch --config_file examples/accelerate_fsdp2.yaml examples/accelerate_fsdp2.py \\
        --model Qwen/Qwen2.5-7B-Instruct --dataset trl-lib/ultrafeedback_binarized
    torchrun --nproc-per-node 2 examples/accelerate_fsdp2.py     # CPUs, and a tiny model, made here

Needs ``pip install "spo_kernels[trl]"``. On CPUs accelerate would train with DDP, without a word: `fsdp2_on_cpus`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl_spo
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor


@contextmanager
def fsdp2_on_cpus() -> Iterator[None]:
    """Let accelerate use several processes without an accelerator, and shard their models; no change with one.

    It shards by its own ``fsdp2_prepare_model``. Only its choice of the engine leaves CPUs out.
    """
    if torch.accelerator.is_available():
        yield
        return
    os.environ["ACCELERATE_USE_CPU"] = "true"  # without it each process would train alone
    original = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = options.get("fsdp_plugin") or FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
            )
            if self.mixed_precision != "no":
                self.fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp
    try:
        yield
    finally:
        AcceleratorState.__init__ = original


def main() -> None:
    with fsdp2_on_cpus():
        trainer = trl_spo.run(__doc__)
    models = {"policy": trainer.model, "reference": trainer.ref_model}
    for name, model in models.items():
        whole = [key for key, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        if whole:
            raise SystemExit(f"FSDP2 did not shard {len(whole)} parameters of the {name}, {whole[0]} among them")
    trainer.accelerator.print(f"FSDP2 sharded both models over {trainer.accelerator.num_processes} processes")


if __name__ == "__main__":
    main()
