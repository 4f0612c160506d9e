"""An SPO step over several processes equals that of one process with the whole batch."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate", reason="needs accelerate, see the extra [trl]")
pytest.importorskip("transformers", reason="needs transformers, see the extra [trl]")

import sharded
from processes import Processes
from torch.distributed import ProcessGroup, all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from spo_kernels import SoftImportance, linear_sequence_logps, linear_token_kl, spo_loss
from spo_kernels.integrations.core import attach_head, context_sums

# Pairs of each micro-batch of two steps. Their responses have different numbers of tokens.
WINDOWS = [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11], [12, 13, 14, 15]]]
SETTINGS = {"weighting": "soft", "nll_weight": 0.3}


def one_process(architecture: str, settings: dict[str, Any]) -> list[tuple[float, dict[str, Tensor]]]:
    policy, reference = sharded.models(architecture)
    for model in (policy, reference):
        attach_head(model)
    windows = [[sharded.pairs_of(rows) for rows in window] for window in WINDOWS]
    return sharded.steps_by_sgd(policy, sharded.step_of(reference, settings), windows)


def share(window: list[list[int]], rank: int, world: int) -> list[list[int]]:
    """Pairs of a rank. Rank 0 has all pairs of the first micro-batch but one for each other rank."""
    first, second = window
    own = len(first) - world + 1
    return [first[:own] if rank == 0 else first[own + rank - 1 : own + rank], second[rank::world]]


def shard(model: nn.Module, head: str) -> nn.Module:
    """FSDP2 as accelerate 1.15 does it, where the head is in a unit with the last norm; and with the head elsewhere."""
    from accelerate import Accelerator
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from accelerate_fsdp2 import fsdp2_on_cpus

    if head == "root":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        return model
    if head == "own":
        fully_shard(model.lm_head)
    with fsdp2_on_cpus():
        return fsdp2_prepare_model(Accelerator(), model)


def fsdp2_steps(
    group: ProcessGroup, architecture: str, head: str, deferred: bool, settings: dict[str, Any]
) -> list[tuple[float, dict[str, Tensor]]]:
    rank, world = group.rank(), group.size()
    sharded.use_pool_in_accelerate(rank, world)
    policy, reference = sharded.models(architecture)
    for model in (policy, reference):
        attach_head(model)
        shard(model, head)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert isinstance(model.lm_head, FSDPModule) == (head != "root")
    windows = [[sharded.pairs_of(rows) for rows in share(window, rank, world)] for window in WINDOWS]
    step = sharded.step_of(reference, settings, group=group, rank=rank, world=world)
    results = sharded.steps_by_sgd(policy, step, windows, deferred=deferred)
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())
    return [(mean(loss), gradient) for loss, gradient in results]


def mean(loss: float) -> float:
    """Over the processes."""
    total = torch.tensor(loss, dtype=torch.float64)
    all_reduce(total)
    return total.item() / torch.distributed.get_world_size()


def check(results: list[Any], truth: list[tuple[float, dict[str, Tensor]]], tolerance: float) -> None:
    for result in results_of(results):
        for (loss, gradient), (true_loss, true_gradient) in zip(result, truth, strict=True):
            assert loss == pytest.approx(true_loss, rel=tolerance)
            assert sharded.distance(gradient, true_gradient) < tolerance


@pytest.mark.parametrize("settings", [SETTINGS, {**SETTINGS, "head": "logits"}], ids=["linear", "logits"])
@pytest.mark.parametrize(
    ("architecture", "head", "deferred"),
    [
        ("llama", "accelerate", False),
        ("llama", "accelerate", True),
        ("llama", "own", False),
        ("llama", "own", True),
        ("llama", "root", True),
        ("qwen2", "accelerate", False),
        ("gemma2", "accelerate", True),
        ("gemma2", "root", True),
    ],
)
def test_fsdp2(processes: Processes, architecture: str, head: str, deferred: bool, settings: dict[str, Any]) -> None:
    truth = one_process(architecture, settings)
    check(processes.run(len(processes), fsdp2_steps, architecture, head, deferred, settings), truth, 1e-5)


def gathered_weights(group: ProcessGroup) -> list[bool]:
    """Whether the head's weight inside the forward is a parameter, with its unit sharded in each way."""
    sharded.use_pool_in_accelerate(group.rank(), group.size())
    seen: list[Tensor] = []
    for head in ("accelerate", "own", "root"):
        policy, _ = sharded.models("llama")
        attach_head(policy)
        shard(policy, head)
        policy(torch.ones(1, 2, dtype=torch.int64), spo_head=lambda _, weight, *__: seen.append(weight))
        assert isinstance(policy.lm_head.weight, DTensor) == (head == "own")  # no copy stays where the unit reshards
    return [weight.is_leaf for weight in seen]


def test_fsdp_gathers_the_head_itself(two_processes: Processes) -> None:
    """So that it frees the gathered weight, and reduces its gradient once a step."""
    assert results_of(two_processes.run(2, gathered_weights)) == [[True] * 3] * 2


def half_precision_step(group: ProcessGroup) -> tuple[float, dict[str, Any]]:
    """accelerate's bf16 for FSDP2 rounds what a forward returns to bfloat16."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from accelerate_fsdp2 import fsdp2_on_cpus

    rank, world = group.rank(), group.size()
    sharded.use_pool_in_accelerate(rank, world)
    policy, reference = sharded.models("llama")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    with fsdp2_on_cpus():
        accelerator = Accelerator(mixed_precision="bf16", fsdp_plugin=plugin)
        for model in (policy, reference):
            attach_head(model)
            fsdp2_prepare_model(accelerator, model)
    assert model(torch.ones(1, 2, dtype=torch.int64)).logits.dtype == torch.bfloat16
    step = sharded.step_of(reference, SETTINGS, group=group, rank=rank, world=world)
    window = [sharded.pairs_of(rows) for rows in share(WINDOWS[0], rank, world)]
    step.begin(policy, window, 0)
    loss, metrics = step(policy, window[0])
    loss.backward()
    assert loss.dtype == torch.float32
    values = {"loss": loss.item(), **metrics.means()}
    return mean(loss.item()), {name: values[name] for name in ("loss", "logps/chosen", "spo/normalizer", "spo/kl")}


def test_losses_and_metrics_are_not_rounded_to_half_precision(two_processes: Processes) -> None:
    policy, reference = sharded.models("llama")
    for model in (policy, reference):
        attach_head(model)
    step = sharded.step_of(reference, SETTINGS)
    window = [sharded.pairs_of(rows) for rows in WINDOWS[0]]
    step.begin(policy, window, 0)
    exact = step(policy, sharded.pairs_of(WINDOWS[0][0])).loss.item()
    for loss, values in results_of(two_processes.run(2, half_precision_step)):
        assert loss == pytest.approx(exact, rel=0.03)
        for value in values.values():
            assert torch.tensor(value).bfloat16().item() != pytest.approx(value, rel=1e-7)


def results_of(results: list[Any]) -> list[Any]:
    """Results of processes; raises the exception of one."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def tensor_parallel_steps(
    group: ProcessGroup, architecture: str, settings: dict[str, Any]
) -> list[tuple[float, dict[str, Tensor]]]:
    """All processes have the whole batch; the head, its KL and a part of the layers are split."""
    mesh = init_device_mesh("cpu", (group.size(),), mesh_dim_names=("tp",))
    policy, reference = sharded.models(architecture)
    plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        plan |= {f"{mlp}.gate_proj": ColwiseParallel(), f"{mlp}.up_proj": ColwiseParallel()}
        plan[f"{mlp}.down_proj"] = RowwiseParallel()
    seen = []
    for model in (policy, reference):
        parallelize_module(model, mesh, plan)
        attach_head(model, vocab_dim="tp")
        model(
            torch.ones(1, 2, dtype=torch.int64), spo_head=lambda _, weight, __, options: seen.append((weight, options))
        )
    for weight, options in seen:
        assert not isinstance(weight, DTensor)
        assert (weight.shape[0], options["process_group"].size()) == (64 // group.size(), group.size())
    windows = [[sharded.pairs_of(rows) for rows in window] for window in WINDOWS]
    return sharded.steps_by_sgd(policy, sharded.step_of(reference, settings), windows)


@pytest.mark.parametrize("settings", [SETTINGS, {**SETTINGS, "head": "logits"}], ids=["linear", "logits"])
def test_tensor_parallel_head(processes: Processes, settings: dict[str, Any]) -> None:
    truth = one_process("llama", settings)
    check(processes.run(len(processes), tensor_parallel_steps, "llama", settings), truth, 1e-5)


def tensor_parallel_unit(group: ProcessGroup) -> str:
    policy, _ = sharded.models("llama")
    attach_head(policy, vocab_dim="tp")
    fully_shard(policy.lm_head)
    with pytest.raises(ValueError, match="must be no FSDP unit of its own") as raised:
        policy(torch.ones(1, 2, dtype=torch.int64), spo_head=lambda *_: None)
    return str(raised.value)


def test_tensor_parallel_head_as_an_fsdp_unit_is_refused(two_processes: Processes) -> None:
    assert all("vocab_dim='tp'" in message for message in results_of(two_processes.run(2, tensor_parallel_unit)))


def zero3_step(group: ProcessGroup, architecture: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and weights of a step of DeepSpeed's ZeRO-3, on CPUs and gloo."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    rank, world = group.rank(), group.size()
    sharded.use_pool_in_accelerate(rank, world)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # is read by DeepSpeed's reports alone
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    policy, reference = sharded.models(architecture)
    for model in (policy, reference):
        attach_head(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=settings)
    ref_engine, *_ = deepspeed.initialize(model=reference, config=settings)
    assert all(parameter.numel() == 0 for model in (policy, reference) for parameter in model.parameters())
    step = sharded.step_of(ref_engine, SETTINGS, group=group, rank=rank, world=world)
    window = [sharded.pairs_of(rows) for rows in share(WINDOWS[0], rank, world)]
    step.begin(engine, window, 0)
    total = 0.0
    for pairs in window:
        loss, _ = step(engine, pairs)
        engine.backward(loss)
        engine.step()
        total += loss.item() / len(window)
    weights = {}
    for name, parameter in policy.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    return mean(total), weights


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_zero3(processes: Processes, architecture: str) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    policy, reference = sharded.models(architecture)
    for model in (policy, reference):
        attach_head(model)
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    windows = [[sharded.pairs_of(rows) for rows in WINDOWS[0]]]
    ((true_loss, _),) = sharded.steps_by_sgd(policy, sharded.step_of(reference, SETTINGS), windows)
    for loss, weights in results_of(processes.run(len(processes), zero3_step, architecture)):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        for name, parameter in policy.named_parameters():
            step = (parameter - before[name]).norm()
            # The rounding of a weight is larger than 1e-5 of its step.
            assert (weights[name] - parameter).norm() < 1e-5 * step + 1e-7 * parameter.norm(), name


def context_parallel_gradients(group: ProcessGroup | None) -> tuple[float, Tensor, Tensor]:
    """Loss and gradients of hidden states and head, in one process or with the tokens split over several."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 16, 8, generator=generator)  # chosen and rejected of 2 pairs, 2 samples
    labels = torch.randint(0, 32, (4, 16), generator=generator)
    labels[:, :3] = -100
    labels[1, 5:] = -100  # no token in the second half
    mask = torch.rand(2, 16, generator=generator) < 0.7
    weight, ref_weight = torch.randn(2, 32, 8, generator=generator).unbind(0)
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    columns = slice(16 * rank // size, 16 * (rank + 1) // size)
    mine, weight = hidden[:, columns].clone().requires_grad_(), weight.clone().requires_grad_()
    logps = linear_sequence_logps(mine[:4], weight, labels[:, columns].contiguous())
    kl = linear_token_kl(mine[4:], weight, mine[4:].detach(), ref_weight, mask[:, columns].contiguous()).sum(1)
    if group is not None:
        logps, kl = context_sums(logps, group), context_sums(kl, group)
    chosen, rejected = logps.chunk(2)
    weights = SoftImportance(0.1)(chosen.detach(), rejected.detach())
    loss = spo_loss(chosen, rejected, weight=weights, kl=kl, beta=0.1)[0].mean()
    loss.backward()
    assert mine.grad is not None and weight.grad is not None
    gradients = [mine.grad, weight.grad]
    if group is not None:
        all_reduce(gradients[1])  # the average, as DDP and FSDP take it
        parts = [torch.empty_like(mine.grad) for _ in range(size)]
        torch.distributed.all_gather(parts, mine.grad)
        gradients = [torch.cat(parts, dim=1) / size, gradients[1] / size]
    return loss.item(), *gradients


def test_sequences_split_over_processes(processes: Processes) -> None:
    loss, *truth = context_parallel_gradients(None)
    for own_loss, *gradients in results_of(processes.run(len(processes), context_parallel_gradients)):
        assert own_loss == pytest.approx(loss, rel=1e-6)
        for ours, theirs in zip(gradients, truth, strict=True):
            assert (ours - theirs).norm() < 1e-6 * theirs.norm()
