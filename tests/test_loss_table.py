"""The rows of `LOSSES` against their formulas, written with `math` for one pair, against each other, and against TRL's.

A formula here takes Python numbers of one pair (of all pairs where pairs meet) and knows nothing of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spo_kernels import LinearSPOLoss, SPOLoss
from spo_kernels.losses import (
    LOSSES,
    PowerImportance,
    preference_loss,
    reward_model_loss,
    spo_loss,
)

P = 5


def batch(dtype: torch.dtype = torch.float64, p: int = P) -> dict[str, Any]:
    """Log-probs of responses of some 100 tokens, references, and what some losses need beside them."""
    g = torch.Generator().manual_seed(3)
    noise = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    logp_w, ref_w = (-120 + 10 * noise(p) for _ in range(2))
    logp_l, ref_l = (-110 + 10 * noise(p) for _ in range(2))
    scores = 5 + noise(p), 3 + 0.1 * noise(p)
    embeddings = torch.nn.functional.normalize(noise(p, 4), dim=1)
    return {
        "logps": [x.to(dtype).requires_grad_() for x in (logp_w, logp_l)],
        "references": [x.to(dtype) for x in (ref_w, ref_l)],
        "lengths": tuple(torch.randint(80, 120, (p,), generator=g) for _ in range(2)),
        "scores": scores,
        "similarity": embeddings @ embeddings.mT,
        "sft_logps": (-100 + 5 * noise(p)).to(dtype),
    }


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cost(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)) - x


def ipo(w: float, r: float, rw: float, rl: float, tau: float = 0.1) -> float:
    return ((w - rw) - (r - rl) - 0.5 / tau) ** 2


def odds(average: float) -> float:
    return math.exp(average) / (1 - math.exp(average))


# For each row, cases of (options by name from `batch`, other options, formula of (L_w, L_l, R_w, R_l, inputs...)).
Formula = Callable[..., float]
CASES: list[tuple[str, tuple[str, ...], dict[str, Any], Formula]] = [
    ("spo", (), {"alpha": 0.2}, lambda w, r, rw, rl: -5 * math.log(sigmoid(0.2 * (w - r)))),
    ("dpo", (), {"beta": 0.2}, lambda w, r, rw, rl: -math.log(sigmoid(0.2 * (w - r - rw + rl)))),
    ("ipo", (), {}, ipo),
    ("ipo", (), {"tau": 0.02}, lambda *x: ipo(*x, tau=0.02)),
    ("ipo", ("lengths",), {}, lambda w, r, rw, rl, n: ipo(w / n[0], r / n[1], rw / n[0], rl / n[1])),
    ("odpo", ("scores",), {}, lambda w, r, rw, rl, s: cost(0.1 * (w - r - rw + rl) - math.log(s[0] - s[1]))),
    (
        "odpo",
        ("scores",),
        {"beta": 0.5, "offset_scale": 2.0},
        lambda w, r, rw, rl, s: cost(0.5 * ((w - rw) - (r - rl)) - 2 * math.log(s[0] - s[1])),
    ),
    (
        "rdpo",
        (),
        {},
        lambda w, r, rw, rl: (0.9 * cost(0.1 * (w - r - rw + rl)) - 0.1 * cost(0.1 * (r - w - rl + rw))) / 0.8,
    ),
    ("rdpo", (), {"flip": 0.0, "beta": 0.3}, lambda w, r, rw, rl: cost(0.3 * (w - r - rw + rl))),
    ("cpo", (), {}, lambda w, r, rw, rl: cost(0.1 * (w - r)) - w),
    ("cpo", (), {"beta": 0.3, "nll_weight": 0.0}, lambda w, r, rw, rl: cost(0.3 * (w - r))),
    ("slic", (), {}, lambda w, r, rw, rl: max(0.0, 1 - w + r) - 0.1 * w),
    ("slic", (), {"delta": 3.0, "nll_weight": 0.0}, lambda w, r, rw, rl: max(0.0, 3 - w + r)),
    ("slic", ("sft_logps",), {}, lambda w, r, rw, rl, sft: max(0.0, 1 - w + r) - 0.1 * sft),
    (
        "slic",
        ("scores",),
        {"delta": 4.0},
        lambda w, r, rw, rl, s: max(0.0, 4 * (s[0] - s[1]) - w + r) - 0.1 * w,
    ),
    ("rso", (), {}, lambda w, r, rw, rl: max(0.0, 1 - 0.05 * (w - r - rw + rl))),
    ("simpo", ("lengths",), {}, lambda w, r, rw, rl, n: cost(2 * (w / n[0] - r / n[1]) - 1)),
    ("simpo", ("lengths",), {"beta": 10.0, "gamma": 0.0}, lambda w, r, rw, rl, n: cost(10 * (w / n[0] - r / n[1]))),
    (
        "orpo",
        ("lengths",),
        {},
        lambda w, r, rw, rl, n: -w / n[0] - 0.1 * math.log(sigmoid(math.log(odds(w / n[0]) / odds(r / n[1])))),
    ),
    ("apo_zero", (), {}, lambda w, r, rw, rl: 1 - sigmoid(0.1 * (w - rw)) + sigmoid(0.1 * (r - rl))),
]
# The scale of the rewards, and whether they are of a token.
SCALES: dict[str, tuple[float, bool]] = {
    "spo": (0.1, False),
    "dpo": (0.1, False),
    "ipo": (0.1, False),
    "odpo": (0.1, False),
    "rdpo": (0.1, False),
    "cpo": (0.1, False),
    "rpo": (0.1, False),
    "slic": (1.0, False),
    "rso": (0.05, False),
    "simpo": (2.0, True),
    "orpo": (0.1, True),
    "apo_zero": (0.1, False),
}
NEEDED = {"odpo": ("scores",), "rpo": ("similarity",), "simpo": ("lengths",), "orpo": ("lengths",)}
OPTIONAL = {"ipo": ("lengths",), "cpo": ("lengths",), "slic": ("scores", "sft_logps")}


def inputs_of(name: str, data: dict[str, Any], *, all_of_them: bool = False) -> dict[str, Any]:
    names = NEEDED.get(name, ()) + (OPTIONAL.get(name, ()) if all_of_them else ())
    return {key: data[key] for key in names}


def numbers(value: Any, i: int) -> Any:
    return value[i].item() if isinstance(value, Tensor) else tuple(each[i].item() for each in value)


def rpo_by_loops(data: dict[str, Any], beta: float, temperature: float) -> list[float]:
    w, r, rw, rl = (x.tolist() for x in (*data["logps"], *data["references"]))
    similarity, losses = data["similarity"].tolist(), []
    for i in range(len(w)):
        closeness = [math.exp((similarity[i][j] - 1) / temperature) for j in range(len(w))]
        total = 0.0
        for j in range(len(w)):
            total += cost(beta * closeness[j] / sum(closeness) * ((w[i] - rw[i]) - (r[j] - rl[j])))
        losses.append(total / len(w))
    return losses


def case_id(case: Any) -> str:
    return "-".join([case[0], *case[1], *map(str, case[2])])


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values(case: tuple[str, tuple[str, ...], dict[str, Any], Formula]) -> None:
    name, needed, options, formula = case
    data = batch()
    given = {key: data[key] for key in needed}
    losses = preference_loss(name, *data["logps"], *data["references"], **given, **options)[0]
    for i, loss in enumerate(losses.tolist()):
        scalars = [x[i].item() for x in (*data["logps"], *data["references"])]
        assert loss == pytest.approx(formula(*scalars, *(numbers(x, i) for x in given.values())), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(("beta", "temperature"), [(0.1, 0.5), (2.0, 0.05)])
def test_rpo_is_the_double_loop(beta: float, temperature: float) -> None:
    data = batch()
    options = {"beta": beta, "temperature": temperature, "similarity": data["similarity"]}
    losses = preference_loss("rpo", *data["logps"], *data["references"], **options)[0]
    assert losses.tolist() == pytest.approx(rpo_by_loops(data, beta, temperature), rel=1e-12)


def test_cpo_with_lengths_has_the_mean_over_all_chosen_tokens() -> None:
    data = batch()
    logp_w, logp_l = (x.tolist() for x in data["logps"])
    nll = -sum(logp_w) / data["lengths"][0].sum().item()
    losses = preference_loss("cpo", *data["logps"], lengths=data["lengths"], nll_weight=2.0)[0]
    expected = [cost(0.1 * (w - r)) + 2 * nll for w, r in zip(logp_w, logp_l, strict=True)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    mask = torch.tensor([True, False, True, True, False])
    masked = preference_loss("cpo", *data["logps"], lengths=data["lengths"], pair_mask=mask, reduction="mean")[0]
    read = [x[mask] for x in data["logps"]], tuple(n[mask] for n in data["lengths"])
    alone = preference_loss("cpo", *read[0], lengths=read[1], reduction="mean")[0]
    torch.testing.assert_close(masked, alone, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_every_row_is_documented_and_known_here(name: str) -> None:
    assert set(SCALES) == set(LOSSES)
    assert LOSSES[name].inputs == NEEDED.get(name, ())
    assert LOSSES[name].needs_reference == (name not in ("spo", "cpo", "slic", "simpo", "orpo"))
    assert {"pair_mask", "reduction"} <= set(LOSSES[name].options)
    assert f'"{name}"' in (preference_loss.__doc__ or "")
    assert "arXiv" in (LOSSES[name].function.__doc__ or "") or name in ("spo", "dpo")


@pytest.mark.parametrize("name", LOSSES)
def test_rewards(name: str) -> None:
    data = batch()
    scale, of_a_token = SCALES[name]
    _, *rewards = preference_loss(name, *data["logps"], *data["references"], **inputs_of(name, data))
    for reward, logp, reference, length in zip(
        rewards, data["logps"], data["references"], data["lengths"], strict=True
    ):
        expected = scale * (logp.detach() - reference) / (length if of_a_token else 1)
        torch.testing.assert_close(reward, expected, rtol=1e-13, atol=1e-13)
        assert not reward.requires_grad
    if not LOSSES[name].needs_reference:
        bare = preference_loss(name, *data["logps"], **inputs_of(name, data))
        referred = preference_loss(name, *data["logps"], *data["references"], **inputs_of(name, data))
        assert torch.equal(bare[0], referred[0])
        expected = scale * data["logps"][0].detach() / (data["lengths"][0] if of_a_token else 1)
        torch.testing.assert_close(bare[1], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str, everything: bool) -> None:
    data = batch()
    given = inputs_of(name, data, all_of_them=everything)
    leaves = list(data["logps"])
    if "sft_logps" in given:
        leaves.append(given.pop("sft_logps").requires_grad_())

    def losses(logp_w: Tensor, logp_l: Tensor, *sft: Tensor) -> Tensor:
        more = {"sft_logps": sft[0]} if sft else {}
        return preference_loss(name, logp_w, logp_l, *data["references"], **given, **more)[0]

    assert torch.autograd.gradcheck(losses, leaves)
    assert torch.autograd.gradgradcheck(losses, leaves)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_but_the_policy_has_a_gradient(name: str, everything: bool) -> None:
    data = batch()
    given = inputs_of(name, data, all_of_them=everything)
    constants = [x.requires_grad_() for x in data["references"]]
    for key in ("scores", "similarity"):
        value = given.get(key, ())
        constants += [x.requires_grad_() for x in ([value] if isinstance(value, Tensor) else value)]
    preference_loss(name, *data["logps"], *data["references"], **given)[0].sum().backward()
    assert all(x.grad is None for x in constants)
    assert all(x.grad is not None for x in data["logps"])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_masked_pairs_are_not_read(name: str, everything: bool, poison: float) -> None:
    data = batch()
    mask = torch.tensor([True, False, True, True, False])
    given = inputs_of(name, data, all_of_them=everything)
    cut = lambda x: x[mask] if isinstance(x, Tensor) else tuple(each[mask] for each in x)  # noqa: E731
    clean = {key: value[mask][:, mask] if key == "similarity" else cut(value) for key, value in given.items()}
    leaves = [x.detach()[mask].requires_grad_() for x in data["logps"]]
    expected = preference_loss(name, *leaves, *(x[mask] for x in data["references"]), **clean)
    with torch.no_grad():
        for x in (*data["logps"], *data["references"], *given.get("scores", ())):
            x[~mask] = poison
        for length in given.get("lengths", ()):
            length[~mask] = 0
        if "sft_logps" in given:
            given["sft_logps"][~mask] = poison
        if "similarity" in given:
            given["similarity"][~mask] = poison
            given["similarity"][:, ~mask] = poison
    masked = preference_loss(name, *data["logps"], *data["references"], **given, pair_mask=mask)
    for ours, theirs in zip(masked, expected, strict=True):
        torch.testing.assert_close(ours[mask], theirs, rtol=1e-13, atol=1e-15)
        assert ours[~mask].tolist() == [0, 0]
    gradients = torch.autograd.grad(masked[0].sum(), data["logps"])
    for ours, theirs in zip(gradients, torch.autograd.grad(expected[0].sum(), leaves), strict=True):
        torch.testing.assert_close(ours[mask], theirs, rtol=1e-13, atol=1e-15)
        assert ours[~mask].tolist() == [0, 0]
    mean = preference_loss(name, *data["logps"], *data["references"], **given, pair_mask=mask, reduction="mean")[0]
    torch.testing.assert_close(mean, expected[0].mean(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_no_pair(name: str) -> None:
    data = batch(p=0)
    given = inputs_of(name, data, all_of_them=True)
    outputs = preference_loss(name, *data["logps"], *data["references"], **given)
    assert [list(x.shape) for x in outputs] == [[0]] * 3
    for reduction in ("mean", "sum"):
        loss = preference_loss(name, *data["logps"], *data["references"], **given, reduction=reduction)[0]
        assert loss.item() == 0
        loss.backward()
    full = batch()
    none = torch.zeros(P, dtype=torch.bool)
    given = inputs_of(name, full, all_of_them=True)
    loss = preference_loss(name, *full["logps"], *full["references"], **given, pair_mask=none, reduction="mean")[0]
    assert loss.item() == 0
    loss.backward()
    assert full["logps"][0].grad.tolist() == [0] * P


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    data = batch(dtype)
    given = inputs_of(name, data, all_of_them=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = preference_loss(name, *data["logps"], *data["references"], **given)
    assert [x.dtype for x in outputs] == [torch.float32] * 3
    wide = [x.detach().double() for x in (*data["logps"], *data["references"])]
    exact = preference_loss(name, *wide, **given)[0]
    torch.testing.assert_close(outputs[0].double(), exact, rtol=2e-5, atol=2e-5)
    outputs[0].sum().backward()
    assert data["logps"][0].grad.dtype == dtype


INF = math.inf
# loss of (L_w, L_l) = (-inf, -3) and (-3, -inf), references -3
IMPOSSIBLE = {
    "spo": (INF, 0.0),
    "dpo": (INF, 0.0),
    "ipo": (INF, INF),
    "odpo": (INF, 0.0),
    "rdpo": (INF, -INF),
    "cpo": (INF, 3.0),
    "slic": (INF, 0.3),
    "rso": (INF, 0.0),
    "simpo": (INF, 0.0),
    "orpo": (INF, 3.0),
    "apo_zero": (1.5, 0.5),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_responses(name: str) -> None:
    logp_w = torch.tensor([-INF, -3.0], dtype=torch.float64)
    logp_l = torch.tensor([-3.0, -INF], dtype=torch.float64)
    reference = torch.full((2,), -3.0, dtype=torch.float64)
    one = torch.ones(2, dtype=torch.float64)
    given = {"odpo": {"scores": (2 * one, one)}, "simpo": {"lengths": (one, one)}, "orpo": {"lengths": (one, one)}}
    losses = preference_loss(name, logp_w, logp_l, reference, reference, **given.get(name, {}))[0]
    assert losses.tolist() == pytest.approx(IMPOSSIBLE[name])


class TestIdentities:
    def losses(self, name: str, data: dict[str, Any], **options: Any) -> Tensor:
        return preference_loss(name, *data["logps"], *data["references"], **options)[0]

    @pytest.mark.parametrize("alpha", [0.01, 0.1, 2.0])
    def test_spo_is_cpo_without_nll_over_alpha(self, alpha: float) -> None:
        data = batch()
        cpo = self.losses("cpo", data, beta=alpha, nll_weight=0.0)
        torch.testing.assert_close(self.losses("spo", data, alpha=alpha), cpo / alpha, rtol=1e-14, atol=0)

    @pytest.mark.parametrize("flip", [0.0, 0.1, 0.4])
    def test_rdpo_is_unbiased(self, flip: float) -> None:
        """The mean over flips of the label is the loss of the true label."""
        data = batch()
        swapped = {"logps": data["logps"][::-1], "references": data["references"][::-1]}
        kept, flipped = self.losses("rdpo", data, flip=flip), self.losses("rdpo", swapped, flip=flip)
        torch.testing.assert_close((1 - flip) * kept + flip * flipped, self.losses("dpo", data), rtol=1e-12, atol=0)

    def test_odpo_at_a_gap_of_1_is_dpo(self) -> None:
        data = batch()
        scores = torch.arange(P) + 1, torch.arange(P)
        assert torch.equal(self.losses("odpo", data, scores=scores), self.losses("dpo", data))
        assert torch.equal(self.losses("odpo", data, scores=data["scores"], offset_scale=0.0), self.losses("dpo", data))

    def test_rpo_at_temperature_0_is_dpo(self) -> None:
        """Pairs of other prompts add log 2 each, without a gradient."""
        data = batch()
        rpo = self.losses("rpo", data, similarity=data["similarity"], temperature=1e-4)
        dpo = self.losses("dpo", data)
        torch.testing.assert_close(P * rpo - (P - 1) * math.log(2), dpo, rtol=1e-12, atol=1e-13)
        gradients = [torch.autograd.grad(x.sum(), data["logps"]) for x in (P * rpo, dpo)]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=0)

    def test_rpo_of_one_prompt_divides_beta(self) -> None:
        data = batch(p=1)
        data = {key: [x.repeat(P) for x in data[key]] for key in ("logps", "references")}
        rpo = self.losses("rpo", data, similarity=torch.ones(P, P, dtype=torch.float64), beta=0.5)
        torch.testing.assert_close(rpo, self.losses("dpo", data, beta=0.5 / P), rtol=1e-13, atol=0)

    @pytest.mark.parametrize("gamma", [0.05, 0.5])
    def test_slic_hf_without_nll_is_rso_over_gamma_at_an_even_reference(self, gamma: float) -> None:
        data = batch()
        data["references"] = [torch.zeros(P, dtype=torch.float64)] * 2
        slic = self.losses("slic", data, delta=1 / gamma, nll_weight=0.0)
        torch.testing.assert_close(gamma * slic, self.losses("rso", data, gamma=gamma), rtol=1e-13, atol=1e-15)

    def test_slic_with_a_gap_of_1_is_slic_hf(self) -> None:
        data = batch()
        scores = torch.stack((torch.arange(P) + 1, torch.arange(P)))
        assert torch.equal(self.losses("slic", data, scores=scores), self.losses("slic", data))

    def test_ipo_rests_where_the_population_does(self) -> None:
        """With a share p of pairs in favour of a response, h = (p - 1/2) / tau is the minimizer."""
        share, tau, zero = 0.8, 0.3, torch.zeros(1, dtype=torch.float64)
        logp = torch.tensor([(share - 0.5) / tau], dtype=torch.float64, requires_grad=True)
        ahead = preference_loss("ipo", logp, zero, zero, zero, tau=tau)[0]
        behind = preference_loss("ipo", zero, logp, zero, zero, tau=tau)[0]
        (gradient,) = torch.autograd.grad(share * ahead + (1 - share) * behind, logp)
        assert abs(gradient.item()) < 1e-12

    def test_simpo_of_equal_lengths_without_a_margin_is_cpo(self) -> None:
        data = batch()
        ten = torch.full((P,), 10)
        simpo = self.losses("simpo", data, lengths=(ten, ten), gamma=0.0, beta=2.0)
        torch.testing.assert_close(simpo, self.losses("cpo", data, beta=0.2, nll_weight=0.0), rtol=1e-13, atol=0)


def test_orpo_of_a_certain_response_has_a_finite_gradient() -> None:
    """A response learnt by heart has the log-prob 0 in float32."""
    logp_w = torch.tensor([0.0, -1.0], requires_grad=True)
    logp_l = torch.tensor([-1.0, 0.0], requires_grad=True)
    one = torch.ones(2)
    losses = preference_loss("orpo", logp_w, logp_l, lengths=(one, one))[0]
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logp_w.grad.isfinite().all()
    assert logp_l.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if {"lengths", "scores"} & set(LOSSES[name].options)])
def test_pairs_of_numbers_may_be_one_tensor(name: str) -> None:
    data = batch()
    given = {key: data[key] for key in ("lengths", "scores") if key in LOSSES[name].options}
    stacked = {key: torch.stack(value) for key, value in given.items()}
    ours, theirs = (preference_loss(name, *data["logps"], *data["references"], **x)[0] for x in (stacked, given))
    assert torch.equal(ours, theirs)


def test_a_length_of_0_counts_as_1() -> None:
    data = batch()
    zero, one = (torch.full((P,), n) for n in (0, 1))
    ours, theirs = (preference_loss("simpo", *data["logps"], lengths=(n, n))[0] for n in (zero, one))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("simpo", {}, TypeError, r"simpo needs lengths, got None; see `spo_kernels\.losses\.simpo_loss`"),
        ("odpo", {"scores": None}, TypeError, "odpo needs scores, got None"),
        ("rpo", {}, TypeError, "rpo needs similarity, got None"),
        ("dpo", {"lengths": 1}, TypeError, "dpo takes the options beta, label_smoothing, .*, got lengths"),
        ("ipo", {"lengths": torch.ones(P)}, TypeError, r"lengths must be two Tensors \[P\], .*, got \[5\]"),
        ("ipo", {"lengths": 3}, TypeError, r"lengths must be two Tensors \[P\], .*, got int"),
        ("ipo", {"lengths": (3, 4)}, TypeError, r"lengths must be two Tensors \[P\], got a int in it"),
        (
            "ipo",
            {"lengths": (torch.ones(P), torch.ones(2))},
            ValueError,
            r"lengths must be .*got \[2\] float32 against",
        ),
        ("ipo", {"lengths": torch.ones(2, P, device="meta")}, ValueError, "lengths must be on the device .*got meta"),
        ("ipo", {"lengths": torch.ones(2, P).bool()}, ValueError, "lengths must be .* of numbers .*got .* bool"),
        ("ipo", {"tau": 0.0}, ValueError, r"tau must be > 0 and finite, got 0\.0"),
        ("odpo", {"scores": torch.ones(2, P)}, RuntimeError, "scores must be higher for the chosen response"),
        (
            "odpo",
            {"scores": torch.ones(2, P) * math.nan},
            RuntimeError,
            "scores must be higher for the chosen response",
        ),
        ("odpo", {"scores": torch.ones(2, P), "offset_scale": -1}, ValueError, "offset_scale must be >= 0"),
        ("rdpo", {"flip": 0.5}, ValueError, r"flip must be >= 0 and < 0\.5, got 0\.5"),
        ("cpo", {"nll_weight": -1.0}, ValueError, r"nll_weight must be >= 0 and finite, got -1\.0"),
        (
            "cpo",
            {"nll_weight": 0, "lengths": torch.ones(2, P)},
            ValueError,
            "lengths must be None where nll_weight is 0",
        ),
        ("rpo", {"similarity": torch.ones(P)}, ValueError, r"similarity must be \[P, P\] with P = 5, got \[5\]"),
        ("rpo", {"similarity": [1.0]}, TypeError, r"similarity must be a floating-point Tensor \[P, P\], got list"),
        ("rpo", {"similarity": torch.ones(P, P, device="meta")}, ValueError, "similarity must be on the device"),
        ("rpo", {"similarity": torch.ones(P, P), "temperature": 0}, ValueError, "temperature must be > 0"),
        ("slic", {"sft_logps": torch.ones(2)}, ValueError, r"sft_logps must be \[P\] like policy_chosen_logps"),
        (
            "slic",
            {"sft_logps": torch.ones(P), "nll_weight": 0},
            ValueError,
            "sft_logps must be None where nll_weight is 0",
        ),
        ("slic", {"delta": -1}, ValueError, "delta must be >= 0"),
        ("rso", {"gamma": 0}, ValueError, "gamma must be > 0"),
        ("orpo", {"lengths": torch.ones(2, P), "beta": 0}, ValueError, "beta must be > 0"),
        ("apo_zero", {"beta": torch.ones(())}, TypeError, "beta must be a Python number, got Tensor"),
        ("apo_zero", {"pair_mask": torch.ones(P)}, ValueError, r"pair_mask must be \[P\] bool"),
        ("apo_zero", {"reduction": "batch"}, ValueError, "reduction must be one of none, mean, sum, got 'batch'"),
    ],
)
def test_errors(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    data = batch()
    with pytest.raises(error, match=message):
        preference_loss(name, *data["logps"], *data["references"], **change)


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].needs_reference])
def test_a_missing_reference_is_an_error(name: str) -> None:
    data = batch()
    with pytest.raises(ValueError, match=rf"must be \[P\] for {name}, got None"):
        preference_loss(name, *data["logps"], **inputs_of(name, data))


class TestRewardModelLoss:
    def test_is_the_likelihood_of_bradley_terry(self) -> None:
        chosen, rejected = batch()["logps"]
        losses = reward_model_loss(chosen / 50, rejected / 50)
        for loss, w, r in zip(losses.tolist(), chosen.tolist(), rejected.tolist(), strict=True):
            exp_w, exp_l = math.exp(w / 50), math.exp(r / 50)
            assert loss == pytest.approx(-math.log(exp_w / (exp_w + exp_l)), rel=1e-12)
        assert torch.autograd.gradcheck(reward_model_loss, (chosen, rejected))

    def test_mask_and_reduction(self) -> None:
        chosen, rejected = batch()["logps"]
        mask = torch.tensor([True, False, True, True, False])
        expected = reward_model_loss(chosen[mask], rejected[mask], reduction="mean")
        with torch.no_grad():
            chosen[~mask] = math.nan
        loss = reward_model_loss(chosen, rejected, pair_mask=mask, reduction="mean")
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert chosen.grad[~mask].tolist() == [0, 0]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"rejected_rewards": torch.zeros(3)}, r"rejected_rewards must be \[P\] like chosen_rewards, got \[3\]"),
            ({"pair_mask": torch.ones(3).bool()}, r"pair_mask must be \[P\] bool like chosen_rewards, got \[3\] bool"),
            ({"reduction": "all"}, "reduction must be one of"),
        ],
    )
    def test_errors(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            reward_model_loss(**{"chosen_rewards": torch.zeros(P), "rejected_rewards": torch.zeros(P), **change})


class TestPowerImportance:
    def test_is_the_power_over_its_mean(self) -> None:
        logp_w, logp_l = (x.detach() / 20 for x in batch()["logps"])  # probabilities that float64 holds
        power = (logp_w.exp() + logp_l.exp()) ** 0.3
        torch.testing.assert_close(PowerImportance(0.3)(logp_w, logp_l), power / power.mean())
        torch.testing.assert_close(PowerImportance(0.3, math.log(0.01))(logp_w, logp_l), power / 0.01)
        torch.testing.assert_close(PowerImportance(0.3).batch_normalizer(logp_w, logp_l), power.mean().log())
        assert PowerImportance(0.0)(logp_w, logp_l).tolist() == pytest.approx([1] * P)

    def test_probabilities_below_float32(self) -> None:
        logp = torch.tensor([-400.0, -410.0])
        mu = PowerImportance(0.1)(logp, logp - 5)
        assert mu.mean().item() == pytest.approx(1, rel=1e-5)
        assert (mu[0] / mu[1]).item() == pytest.approx(math.e, rel=1e-4)

    def test_running_average_of_the_logarithm(self) -> None:
        first, second = (tuple(scale * x.detach() for x in batch()["logps"]) for scale in (1, 0.5))
        importance, of_a_batch = PowerImportance(0.1, "ema", decay=0.75), PowerImportance(0.1)
        importance(*first)
        mu = importance(*second)
        normalizer = 0.75 * of_a_batch.batch_normalizer(*first) + 0.25 * of_a_batch.batch_normalizer(*second)
        torch.testing.assert_close(mu, PowerImportance(0.1, normalizer)(*second), rtol=1e-5, atol=0)

    def test_masked_pairs_enter_no_mean(self) -> None:
        logp_w, logp_l = (x.detach() for x in batch()["logps"])
        mask = torch.tensor([True, False, True, True, False])
        mu = PowerImportance(0.2)(torch.where(mask, logp_w, math.nan), logp_l, mask)
        torch.testing.assert_close(mu[mask], PowerImportance(0.2)(logp_w[mask], logp_l[mask]))
        losses = spo_loss(logp_w, logp_l, weight=PowerImportance(0.2), pair_mask=mask)[0]
        expected = spo_loss(logp_w[mask], logp_l[mask], weight=PowerImportance(0.2))[0]
        torch.testing.assert_close(losses[mask], expected)

    def test_no_pair(self) -> None:
        none = torch.zeros(0)
        assert PowerImportance(0.1)(none, none).shape == (0,)
        assert PowerImportance(0.1).batch_normalizer(none, none).isnan()
        importance = PowerImportance(0.1, "ema")
        importance(none, none)
        assert importance.num_updates == 0

    def test_is_never_differentiated(self) -> None:
        logp_w, logp_l = batch()["logps"]
        mu = PowerImportance(0.1)(logp_w, logp_l)
        assert not mu.requires_grad
        by_module = torch.autograd.grad(spo_loss(logp_w, logp_l, weight=PowerImportance(0.1))[0].sum(), logp_w)
        by_tensor = torch.autograd.grad(spo_loss(logp_w, logp_l, weight=mu)[0].sum(), logp_w)
        torch.testing.assert_close(by_module, by_tensor)

    def test_compiles(self) -> None:
        importance = PowerImportance(0.1)
        compiled = torch.compile(importance, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*batch()["logps"]), importance(*batch()["logps"]))

    def test_modules_take_it(self) -> None:
        """Of hidden states too, though the head's own gradient knows `SoftImportance` alone."""
        g = torch.Generator().manual_seed(1)
        hidden = torch.randn(2 * P, 4, 3, generator=g, dtype=torch.float64).requires_grad_()
        head = torch.randn(7, 3, generator=g, dtype=torch.float64)
        labels = torch.randint(0, 7, (2 * P, 4), generator=g)
        logps = (hidden @ head.T).log_softmax(-1).gather(-1, labels[..., None])[..., 0].sum(1)
        expected = spo_loss(logps[:P], logps[P:], weight=PowerImportance(0.1), reduction="mean")[0]
        of_logits = SPOLoss(weight=PowerImportance(0.1))(hidden @ head.T, labels)[0]
        of_hidden = LinearSPOLoss(weight=PowerImportance(0.1))(hidden, head, labels)[0]
        fixed = LinearSPOLoss(weight=PowerImportance(0.1, -1.0))(hidden, head, labels)[0]
        torch.testing.assert_close(of_logits, expected)
        torch.testing.assert_close(of_hidden, expected)
        wanted = spo_loss(logps[:P], logps[P:], weight=PowerImportance(0.1, -1.0), reduction="mean")[0]
        torch.testing.assert_close(fixed, wanted)
        gradients = [torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (of_logits, of_hidden, expected)]
        torch.testing.assert_close(gradients[0], gradients[2])
        torch.testing.assert_close(gradients[1], gradients[2])


@pytest.mark.parametrize("name", LOSSES)
def test_compiles(name: str) -> None:
    torch.compiler.reset()
    data = batch()
    given = inputs_of(name, data, all_of_them=True)

    def loss(*logps: Tensor) -> Tensor:
        return preference_loss(name, *logps, *data["references"], **given)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*data["logps"])
    eager = loss(*data["logps"])
    torch.testing.assert_close(compiled, eager)
    upstream = torch.linspace(-1, 1, P, dtype=torch.float64)
    gradients = [torch.autograd.grad(x, data["logps"], upstream) for x in (compiled, eager)]
    torch.testing.assert_close(gradients[0], gradients[1])
