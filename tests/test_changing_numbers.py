"""Numbers that change from call to call, under torch.compile: at most two graphs, and right values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from heads import near
from options import Options
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from spo_kernels import (
    LinearSPOLoss,
    SoftImportance,
    SPOLoss,
    kl_loss,
    linear_kl_loss,
    linear_sequence_logps,
    linear_token_kl,
    linear_token_logps,
    sequence_logps,
    spo_loss,
    token_kl,
    token_logps,
    token_logps_kl,
)
from spo_kernels.losses import dpo_loss

V = 9

# 1 is the default of a temperature and of a scale. A number that changes may pass it.
NEAR_ONE = (0.55, 0.65, 0.75, 0.85, 1.0, 1.05, 1.15, 1.25, 1.35, 1.45, 1.55, 1.65)
SMALL = tuple(0.02 + k / 50 for k in range(12))
POLICY_NUMBERS = ("temperature", "softcap", "logit_scale")
REF_NUMBERS = ("ref_temperature", "ref_softcap", "ref_logit_scale")


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


class Arguments:
    def __init__(self) -> None:
        self.logits, self.ref_logits = leaf(4, 3, V), torch.randn(4, 3, V, dtype=torch.float64)
        self.hidden, self.weight = leaf(4, 3, 5), leaf(V, 5)
        self.reference = (torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(V, 5, dtype=torch.float64))
        self.labels = torch.randint(0, V, (4, 3))
        self.chosen, self.rejected = leaf(3), leaf(3)
        self.head = (self.hidden, self.weight)
        self.pair = (self.chosen, self.rejected)
        self.kl = {"kl_logits": self.logits, "kl_ref_logits": self.ref_logits}
        names = ("kl_hidden", "kl_ref_hidden", "kl_ref_weight")
        self.linear_kl = dict(zip(names, (self.hidden, *self.reference), strict=True))


OF_NUMBERS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "token_logps": (
        lambda x, **kw: sum(token_logps(x.logits, x.labels, return_entropy=True, return_lse=True, **kw)),
        POLICY_NUMBERS,
    ),
    "sequence_logps": (lambda x, **kw: sequence_logps(x.logits, x.labels, **kw), POLICY_NUMBERS),
    "token_kl": (lambda x, **kw: token_kl(x.logits, x.ref_logits, **kw), POLICY_NUMBERS + REF_NUMBERS),
    "token_logps_kl": (
        lambda x, **kw: sum(token_logps_kl(x.logits, x.labels, x.ref_logits, **kw)),
        POLICY_NUMBERS + REF_NUMBERS,
    ),
    "kl_loss": (lambda x, **kw: kl_loss(x.logits, x.ref_logits, **kw), POLICY_NUMBERS + REF_NUMBERS),
    "linear_token_logps": (
        lambda x, **kw: sum(linear_token_logps(*x.head, x.labels, return_entropy=True, return_lse=True, **kw)),
        POLICY_NUMBERS,
    ),
    "linear_sequence_logps": (lambda x, **kw: linear_sequence_logps(*x.head, x.labels, **kw), POLICY_NUMBERS),
    "linear_token_kl": (lambda x, **kw: linear_token_kl(*x.head, *x.reference, **kw), POLICY_NUMBERS + REF_NUMBERS),
    "linear_kl_loss": (lambda x, **kw: linear_kl_loss(*x.head, *x.reference, **kw), POLICY_NUMBERS + REF_NUMBERS),
    "spo_loss": (lambda x, **kw: spo_loss(*x.pair, kl=x.chosen.detach(), **kw)[0], ("alpha", "beta")),
    "spo_loss centred": (lambda x, **kw: spo_loss(*x.pair, center=True, **kw)[0], ("alpha",)),
    "dpo_loss": (
        lambda x, **kw: dpo_loss(*x.pair, *(y.detach() for y in x.pair), **kw)[0],
        ("beta", "label_smoothing"),
    ),
}


def graphs(call: Callable[[], Tensor], leaves: tuple[Tensor, ...], change: Callable[[float], None], values: Any) -> int:
    """How many graphs the values of a number take. The result and its gradients must be those of eager mode."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for value in values:
        change(value)
        results = [(out, *torch.autograd.grad(out.sum(), leaves, allow_unused=True)) for out in (compiled(), call())]
        for got, want in zip(*results, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                near(got, want)
    return counter.frame_count


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_numbers_of_functions_that_change_take_two_graphs(name: str) -> None:
    """All numbers of a function at once, each with its own values."""
    x = Arguments()
    function, numbers = OF_NUMBERS[name]
    given: Options = {}

    def change(value: float) -> None:
        given.update({number: value / (1 + k / 4) for k, number in enumerate(numbers)})
        if "label_smoothing" in given:
            given["label_smoothing"] = value / 4

    leaves = (x.logits, *x.head, *x.pair)
    assert graphs(lambda: function(x, **given), leaves, change, NEAR_ONE) <= 2


@pytest.mark.parametrize("number", POLICY_NUMBERS + REF_NUMBERS)
def test_a_number_alone_that_changes_takes_two_graphs(number: str) -> None:
    x, given = Arguments(), {}
    function, _ = OF_NUMBERS["token_kl"]
    leaves = (x.logits,)
    assert graphs(lambda: function(x, **given), leaves, lambda value: given.update({number: value}), NEAR_ONE) <= 2


@pytest.mark.parametrize("normalizer", ["batch", "ema", -1.0])
def test_gamma_that_changes_takes_two_graphs(normalizer: Any) -> None:
    x, importance = Arguments(), SoftImportance(0.05, normalizer).eval()

    def call() -> Tensor:
        return (importance(*x.pair) * x.chosen).sum()

    assert graphs(call, x.pair, lambda value: setattr(importance, "gamma", value), SMALL) <= 2


MODULES: dict[str, Callable[..., Any]] = {
    "SPOLoss": SPOLoss,
    **{
        f"LinearSPOLoss {route}": lambda *args, route=route, **kw: LinearSPOLoss(*args, route=route, **kw)
        for route in ("recompute", "recompute_free")
    },
}


@pytest.mark.parametrize("name", MODULES)
def test_attributes_of_modules_that_change_take_two_graphs(name: str) -> None:
    x = Arguments()
    loss = MODULES[name](0.1, 0.2, SoftImportance(0.05, -1.0))
    numbers = ("alpha", "beta", *POLICY_NUMBERS, *REF_NUMBERS)

    def change(value: float) -> None:
        for k, number in enumerate(numbers):
            setattr(loss, number, value / (1 + k / 4))
        loss.importance.gamma = value / 10
        if "Linear" in name:
            loss.nll_weight = value / 5

    def call() -> Tensor:
        if "Linear" in name:
            return loss(*x.head, x.labels, **x.linear_kl)[0]
        return loss(x.logits, x.labels, **x.kl)[0]

    assert graphs(call, (x.logits, *x.head), change, NEAR_ONE) <= 2


def test_a_compiled_softcap_of_inf_is_none() -> None:
    """torch.compile takes a number that changes for finite."""
    x, given = Arguments(), {"softcap": 3.0}
    function, _ = OF_NUMBERS["token_kl"]
    values = (5.0, 4.0, math.inf, 7.0)
    assert graphs(lambda: function(x, **given), (x.logits,), lambda v: given.update(ref_softcap=v), values) <= 3


@pytest.mark.parametrize("number", POLICY_NUMBERS)
def test_a_number_that_changes_to_inf_is_refused(number: str) -> None:
    """torch.compile takes a number that changes for finite."""
    x, given = Arguments(), {}
    torch._dynamo.reset()
    compiled = torch.compile(lambda: token_logps(x.logits, x.labels, **given), backend="eager")
    for given[number] in (0.5, 0.6):
        compiled()
    given[number] = math.inf
    with pytest.raises(ValueError, match=f"^{number} must be"):
        compiled()


@pytest.mark.parametrize("shape", ["rows", "0-d"])
def test_temperatures_in_tensors_take_one_graph(shape: str) -> None:
    x, given = Arguments(), {}
    for name in ("token_logps", "linear_token_logps"):
        function, _ = OF_NUMBERS[name]

        def change(value: float) -> None:
            given["temperature"] = torch.full((4, 3) if shape == "rows" else (), value)

        assert graphs(lambda f=function: f(x, **given), (x.logits, *x.head), change, NEAR_ONE[:4]) == 1


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        *((name, False) for name, (_, numbers) in OF_NUMBERS.items() if "temperature" in numbers),
        ("token_kl", True),
        ("linear_token_kl", True),
    ],
)
def test_every_option_at_once_compiles(name: str, dynamic: bool) -> None:
    """With padding that is NaN, so that a compiled function which reads it is seen."""
    x = Arguments()
    function, numbers = OF_NUMBERS[name]
    x.labels.clamp_(max=V - 3)
    with torch.no_grad():
        for padded in (x.logits, x.ref_logits):
            padded[..., V - 2 :] = math.nan
        for padded in (x.weight, x.reference[1]):
            padded[V - 2 :] = math.nan
    given = {"temperature": torch.rand(4, 3) + 0.5, "softcap": 4.0, "logit_scale": -0.7, "vocab_size": V - 2}
    if "ref_temperature" in numbers:
        given |= {"ref_temperature": torch.rand(4, 3) + 0.5, "ref_softcap": math.inf, "ref_logit_scale": 0.6}

    def call() -> Tensor:
        return function(x, **given)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    leaves = (x.logits,) if "linear" not in name else x.head
    results = [(out, *torch.autograd.grad(out.sum(), leaves)) for out in (compiled(), call())]
    for got, want in zip(*results, strict=True):
        assert want.isfinite().all()
        near(got, want)
