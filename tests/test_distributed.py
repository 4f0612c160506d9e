"""Heads of sharded models, DTensor arguments, and copies of modules that hold a process group, against one process."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Processes
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import spo_kernels as sk

V, H, B, T = 13, 6, 4, 3  # 13 is uneven over 2 processes (7 + 6) and leaves one row for the last of 4
IGNORE = -100


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    pool = Processes(4, tmp_path_factory.mktemp("gloo"))
    yield pool
    pool.close()


def results_of(processes: Processes, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """By rank; raises what a process raised."""
    results = processes.run(size, function, *arguments)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def batch() -> tuple[Tensor, Tensor]:
    """ids and labels, [B, T]; as many unignored labels in each sequence, so that a mean of means is the mean."""
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    labels[torch.arange(B), torch.arange(B) % T] = IGNORE
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(2)), labels


class Model(nn.Module):
    """hidden states of ids, or what `use` makes of them and the head, inside forward."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, H, dtype=torch.float64)
        self.body = nn.Linear(H, H, dtype=torch.float64)
        self.head = nn.Linear(H, V, dtype=torch.float64)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = noise(*parameter.shape, seed=10 + i)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, use: Callable[[Tensor, nn.Linear], Tensor] | None = None) -> Tensor:
        hidden = torch.tanh(self.body(self.embed(ids)))
        return hidden if use is None else use(hidden, self.head)


def loss_of(hidden: Tensor, head: sk.GatheredHead, labels: Tensor) -> Tensor:
    split = {"process_group": head.process_group, "vocab_shards": head.vocab_shards}
    return -sk.linear_token_logps(hidden, head.weight, labels, head.bias, **split).mean()


def step(model: nn.Module, place: str, ids: Tensor, labels: Tensor, **options: Any) -> None:
    if place == "outside":
        hidden = model(ids)
        loss_of(hidden, sk.gather_head(model.head.weight, model.head.bias, **options), labels).backward()
    else:
        use = lambda hidden, head: loss_of(hidden, sk.gather_head(head.weight, head.bias, **options), labels)  # noqa: E731
        model(ids, use).backward()


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor), name
        assert parameter.grad.placements == parameter.placements, name
        gradients[name] = parameter.grad.full_tensor()
    return gradients


def gradients_of_one_process(tied: bool, steps: int) -> dict[str, Tensor]:
    model, (ids, labels) = Model(tied), batch()
    for i in range(steps):
        step(model, "inside", ids.roll(i, -1), labels)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def fsdp_gradients(group: ProcessGroup, place: str, tied: bool, steps: int) -> dict[str, Tensor]:
    """place: "root": head in the root's unit, used in forward; "own": a unit of its own; "outside": after forward."""
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("dp",))
    model = Model(tied)
    if place == "own":
        fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=place == "outside")
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    ids, labels = (x.chunk(group.size())[group.rank()] for x in batch())
    for i in range(steps):
        model.set_requires_gradient_sync(i == steps - 1)
        step(model, place, ids.roll(i, -1), labels)
    return whole_gradients(model)


@pytest.mark.parametrize("steps", [1, 2], ids=["sync", "deferred"])
@pytest.mark.parametrize(
    ("place", "tied"),
    [("root", False), ("root", True), ("own", False), ("outside", False), ("outside", True)],
    ids=["root", "root-tied", "own", "outside", "outside-tied"],
)
def test_fsdp_head(processes: Processes, place: str, tied: bool, steps: int) -> None:
    expected = gradients_of_one_process(tied, steps)
    for gradients in results_of(processes, 2, fsdp_gradients, place, tied, steps):
        assert gradients.keys() == expected.keys()
        for name in expected:
            near(gradients[name], expected[name])


def hybrid_gradients(group: ProcessGroup, place: str) -> dict[str, Tensor]:
    """Parameters replicated over one dimension of the mesh and sharded over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = Model(tied=False)
    if place == "own":
        fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    ids, labels = (x.chunk(4)[group.rank()] for x in batch())
    step(model, place, ids, labels)
    assert model.head.weight.placements == (Replicate(), Shard(0))
    return whole_gradients(model)


@pytest.mark.parametrize("place", ["own", "outside"])
def test_hybrid_sharded_head(processes: Processes, place: str) -> None:
    expected = gradients_of_one_process(False, 1)
    for gradients in results_of(processes, 4, hybrid_gradients, place):
        for name in expected:
            near(gradients[name], expected[name])


def one_process_head() -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias for the mean loss of the batch."""
    hidden, weight, bias = (x.requires_grad_() for x in head_tensors())
    loss_of(hidden, sk.gather_head(weight, bias), batch()[1]).backward()
    assert hidden.grad is not None and weight.grad is not None and bias.grad is not None
    return hidden.grad, weight.grad, bias.grad


def head_tensors() -> tuple[Tensor, Tensor, Tensor]:
    return noise(B, T, H, seed=3), noise(V, H, seed=4), noise(V, seed=5)


def sharded(tensor: Tensor, mesh: DeviceMesh, *placements: Placement) -> Tensor:
    """A leaf that wants a gradient. Not nn.Parameter: a parameter and a DTensor of any other kind are taken alike."""
    return distribute_tensor(tensor.detach(), mesh, placements).requires_grad_()


def gathered_shares(group: ProcessGroup) -> dict[str, Tensor]:
    """Each process has its share of a sum, as the ranks of a context-parallel group do."""
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    hidden, weight, bias = head_tensors()
    weight, bias = sharded(weight, mesh, Shard(1)), sharded(bias, mesh, Replicate())
    hidden, labels = (x.chunk(group.size())[group.rank()] for x in (hidden, batch()[1]))
    head = sk.gather_head(weight, bias, reduction="sum")
    assert type(head.weight) is Tensor and head.process_group is None and head.vocab_shards is None
    (loss_of(hidden, head, labels) / group.size()).backward()
    assert isinstance(weight.grad, DTensor) and weight.grad.placements == weight.placements
    assert isinstance(bias.grad, DTensor) and bias.grad.placements == bias.placements
    return {"weight": weight.grad.full_tensor(), "bias": bias.grad.full_tensor()}


def test_shares_of_a_sum(processes: Processes) -> None:
    _, dweight, dbias = one_process_head()
    for gradients in results_of(processes, 2, gathered_shares):
        near(gradients["weight"], dweight)
        near(gradients["bias"], dbias)


def tensor_parallel(group: ProcessGroup, vocab_dim: str | int) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    hidden, weight, bias = head_tensors()
    weight, bias = (nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in (weight, bias))
    hidden.requires_grad_()
    head = sk.gather_head(weight, bias, vocab_dim=vocab_dim)
    assert head.process_group is group and head.vocab_shards is not None
    assert head.weight.shape[0] == head.vocab_shards[group.rank()]
    loss_of(hidden, head, batch()[1]).backward()
    for parameter in (weight, bias):
        assert isinstance(parameter.grad, DTensor) and parameter.grad.placements == (Shard(0),)
        assert parameter.grad.to_local().shape == parameter.to_local().shape
    assert hidden.grad is not None
    return head.vocab_shards, {
        "hidden": hidden.grad,
        "weight": weight.grad.full_tensor(),
        "bias": bias.grad.full_tensor(),
    }


@pytest.mark.parametrize(("size", "shards"), [(2, (7, 6)), (4, (4, 4, 4, 1))])
@pytest.mark.parametrize("vocab_dim", ["tp", 0])
def test_tensor_parallel_head(processes: Processes, size: int, shards: tuple[int, ...], vocab_dim: str | int) -> None:
    expected = dict(zip(("hidden", "weight", "bias"), one_process_head(), strict=True))
    for vocab_shards, gradients in results_of(processes, size, tensor_parallel, vocab_dim):
        assert vocab_shards == shards
        for name in expected:
            near(gradients[name], expected[name])


def data_and_tensor_parallel(group: ProcessGroup, place: str, steps: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Model(tied=False)
    for name in ("weight", "bias"):
        whole = getattr(model.head, name).detach()
        setattr(model.head, name, nn.Parameter(distribute_tensor(whole, mesh["tp"], [Shard(0)])))
    if place == "own":
        fully_shard(model.head, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"], reshard_after_forward=place == "outside")
    assert model.head.weight.device_mesh.ndim == 2
    dp = mesh.get_local_rank("dp")
    ids, labels = (x.chunk(2)[dp] for x in batch())
    for i in range(steps):
        model.set_requires_gradient_sync(i == steps - 1)
        step(model, place, ids.roll(i, -1), labels, vocab_dim="tp")
    return whole_gradients(model)


@pytest.mark.parametrize("steps", [1, 2], ids=["sync", "deferred"])
@pytest.mark.parametrize("place", ["root", "own", "outside"])
def test_data_and_tensor_parallel_head(processes: Processes, place: str, steps: int) -> None:
    expected = gradients_of_one_process(False, steps)
    for gradients in results_of(processes, 4, data_and_tensor_parallel, place, steps):
        assert gradients.keys() == expected.keys()
        for name in expected:
            near(gradients[name], expected[name])


VOCABULARY = {"logits": -1, "ref_logits": -1, "weight": 0, "bias": 0, "ref_weight": 0, "ref_bias": 0}
WANT_GRADIENTS = ("logits", "hidden", "weight", "bias", "chosen", "rejected")


def inputs() -> dict[str, Tensor]:
    hidden, weight, bias = head_tensors()
    ref_hidden, ref_weight, ref_bias = noise(B, T, H, seed=6), noise(V, H, seed=7), noise(V, seed=8)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 1] = False
    return {
        "logits": hidden @ weight.T + bias,
        "ref_logits": ref_hidden @ ref_weight.T + ref_bias,
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "ref_hidden": ref_hidden,
        "ref_weight": ref_weight,
        "ref_bias": ref_bias,
        "labels": batch()[1],
        "mask": mask,
        "row_weight": torch.linspace(0, 2, B * T, dtype=torch.float64).view(B, T),
        "chosen": noise(B, seed=9),
        "rejected": noise(B, seed=10),
        "pair_weight": torch.linspace(0, 1, B // 2, dtype=torch.float64),
    }


def kl_of_heads(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return x["hidden"], x["weight"], x["ref_hidden"], x["ref_weight"], x["mask"], x["bias"], x["ref_bias"]


def linear_spo_loss(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    objective, metrics = sk.LinearSPOLoss(0.1, 0.2, nll_weight=0.1)(
        x["hidden"],
        x["weight"],
        x["labels"],
        x["bias"],
        pair_weight=x["pair_weight"],
        kl_hidden=x["hidden"],
        kl_ref_hidden=x["ref_hidden"],
        kl_ref_weight=x["ref_weight"],
        kl_ref_bias=x["ref_bias"],
        kl_mask=x["mask"],
    )
    return objective, *metrics


def spo_loss_of_logits(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    module = sk.SPOLoss(0.1, 0.2, sk.SoftImportance(0.1, "ema"))
    objective, metrics = module(
        x["logits"], x["labels"], kl_logits=x["logits"], kl_ref_logits=x["ref_logits"], kl_mask=x["mask"]
    )
    assert module.importance.num_updates == 1  # the caller's module, not a copy of it
    return objective, *metrics


FUNCTIONS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "token_logps": lambda x: sk.token_logps(x["logits"], x["labels"]),
    "sequence_logps": lambda x: sk.sequence_logps(x["logits"], labels=x["labels"], average=True),
    "get_batch_logps": lambda x: sk.get_batch_logps(x["logits"], x["labels"]),
    "token_kl": lambda x: sk.token_kl(x["logits"], x["ref_logits"], x["mask"]),
    "token_logps_kl": lambda x: sk.token_logps_kl(x["logits"], x["labels"], x["ref_logits"]),
    "kl_loss": lambda x: sk.kl_loss(x["logits"], x["ref_logits"], row_weight=x["row_weight"]),
    "SPOLoss": spo_loss_of_logits,
    "linear_token_logps": lambda x: sk.linear_token_logps(
        x["hidden"], x["weight"], x["labels"], x["bias"], return_entropy=True
    ),
    "linear_sequence_logps": lambda x: sk.linear_sequence_logps(x["hidden"], x["weight"], x["labels"]),
    "linear_token_kl": lambda x: sk.linear_token_kl(*kl_of_heads(x)),
    "linear_kl_loss": lambda x: sk.linear_kl_loss(*kl_of_heads(x), row_weight=x["row_weight"]),
    "LinearSPOLoss": linear_spo_loss,
    "spo_loss": lambda x: sk.spo_loss(x["chosen"], x["rejected"], weight=sk.SoftImportance(0.1)),
    "preference_loss": lambda x: sk.preference_loss("dpo", x["chosen"], x["rejected"], x["rejected"], x["chosen"]),
    "preference_loss, lengths": lambda x: sk.preference_loss(
        "orpo", x["chosen"], x["rejected"], lengths=torch.stack((x["chosen"], x["rejected"])).detach().abs() + 1
    ),
    "spo_ranking_loss": lambda x: sk.spo_ranking_loss(
        x["chosen"], group_ids=(x["chosen"] * 0).detach().long(), num_groups=1
    ),
    "cringe_loss": lambda x: sk.cringe_loss(x["logits"], x["labels"]),
    "reward_model_loss": lambda x: sk.reward_model_loss(x["chosen"], x["rejected"]),
    "SoftImportance": lambda x: sk.SoftImportance(0.1)(x["chosen"], x["rejected"]),
    "PowerImportance": lambda x: sk.PowerImportance(0.1)(x["chosen"], x["rejected"]),
    "batch_normalizer": lambda x: sk.SoftImportance(0.1).batch_normalizer(x["chosen"], x["rejected"]),
}
WITHOUT_VOCABULARY = (
    "spo_loss",
    "preference_loss",
    "preference_loss, lengths",
    "spo_ranking_loss",
    "cringe_loss",
    "reward_model_loss",
    "SoftImportance",
    "PowerImportance",
    "batch_normalizer",
)


def outcome(name: str, x: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results, and the gradients of half their sum."""
    results = FUNCTIONS[name](x)
    results = [results] if isinstance(results, Tensor) else list(results)
    for result in results:
        if result.requires_grad:
            result.backward(torch.full_like(result, 0.5), retain_graph=True)
    return [result.detach() for result in results], {
        key: x[key].grad for key in WANT_GRADIENTS if x[key].grad is not None
    }


def dtensor_outcome(group: ProcessGroup, name: str, kind: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """kind: "replicated"; "sharded" along the vocabulary, the rest replicated; "beside": the rest plain Tensors;
    "policy": only logits and weight are sharded."""
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    x = inputs()
    for key, tensor in x.items():
        if kind == "beside" and key not in VOCABULARY:
            x[key] = tensor.requires_grad_(key in WANT_GRADIENTS)
            continue
        whole = kind == "replicated" or key not in VOCABULARY or (kind == "policy" and key not in ("logits", "weight"))
        placement = Replicate() if whole else Shard(VOCABULARY[key] % tensor.dim())
        x[key] = distribute_tensor(tensor, mesh, [placement]).requires_grad_(key in WANT_GRADIENTS)
    results, gradients = outcome(name, x)
    for key, gradient in gradients.items():
        assert type(gradient) is type(x[key])
        # torch 2.10 replicates the gradient of a leaf whose last dimension is sharded unevenly.
        if isinstance(gradient, DTensor) and key != "logits":
            assert gradient.placements == x[key].placements
    for result in results:
        assert isinstance(result, DTensor) == (kind != "beside")
        assert not isinstance(result, DTensor) or result.placements == (Replicate(),)
    local = lambda x: x.full_tensor() if isinstance(x, DTensor) else x  # noqa: E731
    return [local(result) for result in results], {key: local(gradient) for key, gradient in gradients.items()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in FUNCTIONS
        for kind in ("replicated", "sharded", "beside", "policy")
        if kind == "replicated" or name not in WITHOUT_VOCABULARY
    ],
)
def test_dtensor_arguments(processes: Processes, name: str, kind: str) -> None:
    expected = {key: tensor.requires_grad_(key in WANT_GRADIENTS) for key, tensor in inputs().items()}
    results, gradients = outcome(name, expected)
    assert gradients or name in ("SoftImportance", "PowerImportance", "batch_normalizer")
    for actual, actual_gradients in results_of(processes, 2, dtensor_outcome, name, kind):
        for got, wanted in zip(actual, results, strict=True):
            near(got, wanted)
        assert actual_gradients.keys() == gradients.keys()
        for key in gradients:
            near(actual_gradients[key], gradients[key])


def refused(group: ProcessGroup, name: str) -> Any:
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    other = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("other",)) if name == "another mesh" else mesh
    x = inputs()

    def on(key: str, *placements: Placement, mesh: DeviceMesh = mesh) -> Tensor:
        return distribute_tensor(x[key], mesh, placements).requires_grad_(x[key].is_floating_point())

    wrong = [Partial(), Partial()]
    calls: dict[str, Callable[[], Any]] = {
        "rows sharded": lambda: sk.token_logps(on("logits", Shard(0)), on("labels", Shard(0))),
        "labels sharded": lambda: sk.token_logps(on("logits", Replicate()), on("labels", Shard(0))),
        "features sharded": lambda: sk.linear_token_logps(x["hidden"], on("weight", Shard(1)), x["labels"]),
        "hidden sharded": lambda: sk.linear_token_logps(on("hidden", Shard(0)), on("weight", Shard(0)), x["labels"]),
        "partial": lambda: sk.token_logps(DTensor.from_local(x["logits"], mesh, wrong[:1]), x["labels"]),
        "replicated beside": lambda: sk.linear_token_logps(x["hidden"], on("weight", Replicate()), x["labels"]),
        "reference plain": lambda: sk.token_kl(on("logits", Shard(2)), x["ref_logits"]),
        "bias plain": lambda: sk.LinearSPOLoss()(x["hidden"], on("weight", Shard(0)), x["labels"], x["bias"]),
        "another mesh": lambda: sk.token_kl(on("logits", Replicate()), on("ref_logits", Replicate(), mesh=other)),
        "group": lambda: sk.linear_token_logps(x["hidden"], on("weight", Shard(0)), x["labels"], process_group=group),
        "group of the module": lambda: sk.SPOLoss(process_group=group)(on("logits", Shard(2)), x["labels"]),
        "shards": lambda: sk.token_logps(on("logits", Shard(2)), x["labels"], vocab_shards=(7, 6)),
        "in place": lambda: sk.token_logps(on("logits", Shard(2)), x["labels"], inplace_backward=True),
        "module in place": lambda: sk.SPOLoss(inplace_backward=True)(on("logits", Replicate()), x["labels"]),
        "overwritten": lambda: sk.kl_loss(
            on("logits", Replicate()), on("ref_logits", Replicate()), overwrite_logits=True
        ),
        "other batches": lambda: sk.linear_token_kl(
            x["hidden"] + group.rank(), on("weight", Shard(0)), x["ref_hidden"], on("ref_weight", Shard(0)).detach()
        ),
        "other labels": lambda: sk.linear_token_logps(
            x["hidden"], on("weight", Shard(0)), x["labels"].roll(group.rank(), 0)
        ),
        "two vocabularies": lambda: sk.token_kl(
            on("logits", Shard(2)), distribute_tensor(x["ref_logits"][..., 1:], mesh, [Shard(2)])
        ),
        "too few columns": lambda: sk.token_logps(
            distribute_tensor(x["logits"][..., :1], mesh, [Shard(2)]), torch.zeros_like(x["labels"])
        ),
        "losses": lambda: sk.spo_loss(on("chosen", Shard(0)), on("rejected", Shard(0))),
        "losses beside": lambda: sk.spo_loss(on("chosen", Replicate()), x["rejected"]),
        "normalizer": lambda: sk.SoftImportance(0.1, DTensor.from_local(torch.ones(()), mesh, wrong[:1])),
    }
    return calls[name]()


REFUSED = {
    "rows sharded": r"logits must be replicated, or Shard\(dim=2\) over one mesh dimension, got placements "
    r"\(Shard\(dim=0\),\) on the mesh \{'tp': 2\}; spo_kernels.gather_head",
    "labels sharded": r"labels must be replicated, got placements \(Shard\(dim=0\),\) .* spo_kernels.gather_head",
    "features sharded": r"weight must be replicated, or Shard\(dim=0\) .* \(Shard\(dim=1\),\) .*gather_head",
    "hidden sharded": r"hidden must be replicated, got placements \(Shard\(dim=0\),\) .* spo_kernels.gather_head",
    "partial": r"logits must be replicated, or .* got placements \(Partial\(sum\),\) .* spo_kernels.gather_head",
    "replicated beside": "hidden must be a DTensor like weight, got a Tensor with .* spo_kernels.gather_head",
    "reference plain": "ref_logits must be a DTensor like logits, got a Tensor .* spo_kernels.gather_head",
    "bias plain": "bias must be a DTensor like weight, got a Tensor .* spo_kernels.gather_head",
    "another mesh": "ref_logits must be a DTensor on the mesh of logits, got .*'other': 2.* spo_kernels.gather_head",
    "group": "process_group must be None for DTensors.* with weight",
    "group of the module": "process_group must be None for DTensors.* with logits",
    "shards": r"vocab_shards must be None for DTensors.* got \(7, 6\) with logits",
    "in place": "inplace_backward must be False for DTensors, got True with logits",
    "module in place": "inplace_backward must be False for DTensors, got True with logits",
    "overwritten": "overwrite_logits must be False for DTensors, got True with logits, ref_logits",
    "other batches": "hidden must be the same in every process .* spo_kernels.gather_head",
    "other labels": "labels must be the same in every process .* spo_kernels.gather_head",
    "two vocabularies": "ref_logits must have the vocabulary of logits, 13, got 12",
    "too few columns": r"logits must have a vocabulary for 2 processes, got 1: shards \(1, 0\)",
    "losses": r"policy_chosen_logps must be replicated, got .* \(Shard\(dim=0\),\) .* spo_kernels.gather_head",
    "losses beside": "policy_rejected_logps must be a DTensor like policy_chosen_logps, .* spo_kernels.gather_head",
    "normalizer": "normalizer must be replicated, got placements .* spo_kernels.gather_head",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_dtensors(processes: Processes, name: str) -> None:
    for error in processes.run(2, refused, name):
        assert isinstance(error, ValueError), error
        with pytest.raises(ValueError, match=f"^{REFUSED[name]}"):
            raise error


def refused_2d(group: ProcessGroup, name: str) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x = inputs()
    both = distribute_tensor(x["weight"], mesh, [Shard(0), Shard(0)])
    one = distribute_tensor(x["weight"], mesh, [Replicate(), Shard(0)]).requires_grad_()
    calls: dict[str, Callable[[], Any]] = {
        "over two dimensions": lambda: sk.linear_token_logps(x["hidden"], both, x["labels"]),
        "beside, over the other": lambda: sk.linear_token_logps(x["hidden"], one, x["labels"]),
        "no gradient": lambda: sk.linear_token_logps(x["hidden"], one.detach(), x["labels"]),
        "in another order": lambda: sk.gather_head(
            distribute_tensor(x["weight"], DeviceMesh("cpu", [3, 2, 1, 0]), [Shard(0)]), vocab_dim=0
        ),
    }
    return calls[name]()


def test_placements_on_two_dimensions(processes: Processes) -> None:
    for name, message in {
        "over two dimensions": r"^weight must be replicated, or Shard\(dim=0\) over one mesh dimension, .*gather_head",
        "in another order": "^the mesh must list its processes in the order of ranks, got DeviceMesh",
        "beside, over the other": r"^hidden must be a DTensor like weight, got .*'dp': 2, 'tp': 2.*gather_head",
    }.items():
        for error in processes.run(4, refused_2d, name):
            with pytest.raises(ValueError, match=message):
                raise error
    x = inputs()
    expected = sk.linear_token_logps(x["hidden"], x["weight"], x["labels"])
    for result in results_of(processes, 4, refused_2d, "no gradient"):
        near(result, expected)


def refused_head(group: ProcessGroup, name: str) -> Any:
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    other = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("other",)) if name == "another mesh" else mesh
    _, weight, bias = head_tensors()
    rows, row_bias = sharded(weight, mesh, Shard(0)), sharded(bias, other, Shard(0))
    calls: dict[str, Callable[[], Any]] = {
        "reduction": lambda: sk.gather_head(rows, reduction="mean"),  # type: ignore[arg-type]
        "kind": lambda: sk.gather_head(weight, row_bias),
        "plain bias": lambda: sk.gather_head(rows, bias, vocab_dim="tp"),
        "another mesh": lambda: sk.gather_head(rows, row_bias),
        "partial": lambda: sk.gather_head(DTensor.from_local(weight, mesh, [Partial()])),
        "plain weight": lambda: sk.gather_head(weight, vocab_dim="tp"),
        "no such dimension": lambda: sk.gather_head(rows, vocab_dim="dp"),
        "no such index": lambda: sk.gather_head(rows, vocab_dim=1),
        "replicated": lambda: sk.gather_head(sharded(weight, mesh, Replicate()), vocab_dim="tp"),
        "empty shard": lambda: sk.gather_head(sharded(weight[:1], mesh, Shard(0)), vocab_dim="tp"),
    }
    return calls[name]()


REFUSED_HEADS = {
    "reduction": 'reduction must be "avg" or "sum", got \'mean\'',
    "kind": r"bias must be a Tensor like weight, got placements \(Shard\(dim=0\),\)",
    "plain bias": "bias must be a DTensor on the mesh of weight, got a Tensor with weight placements",
    "another mesh": "bias must be a DTensor on the mesh of weight, got placements .*'other': 2",
    "partial": r"weight must be sharded or replicated, got placements \(Partial\(sum\),\)",
    "plain weight": "weight must be a DTensor whose mesh has the dimension vocab_dim='tp', got a Tensor",
    "no such dimension": "vocab_dim must be a dimension of the mesh of weight: 'tp', 0; got 'dp'",
    "no such index": "vocab_dim must be a dimension of the mesh of weight: 'tp', 0; got 1",
    "replicated": r"weight must be Shard\(0\) over vocab_dim, got placements \(Replicate\(\),\)",
    "empty shard": r"weight must have a vocabulary for 2 processes, got 1: shards \(1, 0\)",
}


@pytest.mark.parametrize("name", REFUSED_HEADS)
def test_refused_heads(processes: Processes, name: str) -> None:
    for error in processes.run(2, refused_head, name):
        assert isinstance(error, ValueError), error
        with pytest.raises(ValueError, match=f"^{REFUSED_HEADS[name]}"):
            raise error


def test_tensors_pass() -> None:
    weight, bias = nn.Parameter(torch.zeros(3, 2)), torch.zeros(3)
    assert sk.gather_head(weight) == (weight, None, None, None)
    head = sk.gather_head(weight, bias)
    assert head.weight is weight and head.bias is bias


def compiled(group: ProcessGroup, kind: str) -> tuple[Tensor, Tensor]:
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    x = inputs()
    weight = sharded(x["weight"], mesh, Replicate() if kind == "replicated" else Shard(0))
    rest = (x["hidden"], x["labels"])
    if kind == "replicated":
        rest = tuple(distribute_tensor(tensor, mesh, [Replicate()]) for tensor in rest)

    def loss(weight: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        if kind == "gathered":
            weight = sk.gather_head(weight).weight
        return -sk.linear_token_logps(hidden, weight, labels).mean()

    result = torch.compile(loss, fullgraph=True, backend="aot_eager")(weight, *rest)
    result.backward()
    assert isinstance(weight.grad, DTensor) and weight.grad.placements == weight.placements
    return result.full_tensor() if isinstance(result, DTensor) else result.detach(), weight.grad.full_tensor()


@pytest.mark.parametrize("kind", ["replicated", "sharded", "gathered"])
def test_compiled(processes: Processes, kind: str) -> None:
    x = inputs()
    weight = x["weight"].requires_grad_()
    loss = -sk.linear_token_logps(x["hidden"], weight, x["labels"]).mean()
    (dweight,) = torch.autograd.grad(loss, weight)
    for result, gradient in results_of(processes, 2, compiled, kind):
        near(result, loss)
        near(gradient, dweight)


def modules(group: ProcessGroup | None) -> dict[str, nn.Module]:
    return {
        "SPOLoss": sk.SPOLoss(0.1, 0.2, 0.1, process_group=group, vocab_shards=None if group is None else (7, 6)),
        "LinearSPOLoss": sk.LinearSPOLoss(weight=sk.SoftImportance(0.1, "ema", group), process_group=group),
        "SoftImportance": sk.SoftImportance(0.1, "batch", group),
    }


def copied(group: ProcessGroup, name: str) -> bytes:
    """The pickle; its copies have the group itself."""
    module = modules(group)[name]
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    pickled = pickle.dumps(module)
    ways = (copy.copy(module), copy.deepcopy(module), pickle.loads(pickled), torch.load(file, weights_only=False))
    for other in ways:
        assert type(other) is type(module) and repr(other) == repr(module)
        for held, wanted in zip(other.modules(), module.modules(), strict=True):
            assert held.process_group is wanted.process_group
        assert copy.deepcopy({"a": other, "b": other})["b"].process_group is module.process_group
    assert module.process_group is group  # untouched by what it was made into
    chosen = torch.tensor([-1.0, -2.0])[group.rank() :]
    importance = ways[1] if name == "SoftImportance" else ways[1].importance
    again = sk.SoftImportance(0.1, importance.normalizer, importance.process_group)
    assert torch.equal(importance(chosen, chosen), again(chosen, chosen))
    return pickled


@pytest.mark.parametrize("name", ["SPOLoss", "LinearSPOLoss", "SoftImportance"])
def test_copies_of_a_module_with_a_group(processes: Processes, name: str) -> None:
    pickled, _ = results_of(processes, 2, copied, name)
    module = pickle.loads(pickled)  # this process has no group
    module = copy.deepcopy(pickle.loads(pickle.dumps(module)))
    module.load_state_dict(modules(None)[name].state_dict())
    with pytest.raises(RuntimeError, match="pickled with the process group '.*', which this process does not have"):
        module.process_group  # noqa: B018
    x = inputs()
    call = {
        "SPOLoss": lambda: module(x["logits"], x["labels"], kl_logits=x["logits"], kl_ref_logits=x["ref_logits"]),
        "LinearSPOLoss": lambda: module(x["hidden"], x["weight"], x["labels"]),
        "SoftImportance": lambda: module(x["chosen"], x["rejected"]),
    }[name]
    with pytest.raises(RuntimeError, match="make it before the first call, or assign the module's process_group"):
        call()
    for held in module.modules():
        held.process_group = None
    if name == "SPOLoss":
        module.vocab_shards = None
    call()


@pytest.mark.parametrize("name", ["SPOLoss", "LinearSPOLoss", "SoftImportance"])
def test_copies_of_a_module_without_a_group(name: str) -> None:
    module = modules(None)[name]
    earlier = type(module).__new__(type(module))  # from a pickle of a version without HoldsProcessGroup
    state = module.__getstate__()
    del state["_process_group"]
    earlier.__setstate__(state | {"process_group": None})
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), earlier):
        assert other.process_group is None and repr(other) == repr(module)
        other.load_state_dict(module.state_dict())


def test_torch_without_distributed(tmp_path: Path) -> None:
    """A build of torch without it has the module, and is_available() is False."""
    code = """
import torch._dynamo, torch.distributed
torch.distributed.is_available = lambda: False
for name in ("ProcessGroup", "all_reduce", "distributed_c10d", "is_initialized"):
    delattr(torch.distributed, name)
import copy, pickle, spo_kernels
class Subclass(torch.Tensor): pass
logits, labels = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
assert spo_kernels.token_logps(logits.as_subclass(Subclass), labels).shape == (2,)
assert spo_kernels.gather_head(logits).weight is logits
module = pickle.loads(pickle.dumps(copy.deepcopy(spo_kernels.LinearSPOLoss(weight=0.1))))
module(logits[:, None], torch.ones(3, 4), labels[:, None])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)
