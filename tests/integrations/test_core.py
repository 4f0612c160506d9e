"""The parts of an SPO step, with tiny Hugging Face models."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="needs transformers, see the extra [trl]")

from tiny_models import ARCHITECTURES, make_model, make_rows, make_tokenizer  # noqa: E402

from spo_kernels.integrations.core import (  # noqa: E402
    HFSampler,
    KLBuffer,
    Pairs,
    Reference,
    Samples,
    SpecialTokens,
    SPOSettings,
    SPOStep,
    attach_head,
    join_rows,
)
from spo_kernels.integrations.sampling import evaluating  # noqa: E402

TOKENIZER = make_tokenizer()
SPECIAL = SpecialTokens.of(TOKENIZER)
ROWS = make_rows(16)
PROMPTS = [TOKENIZER(row["prompt"])["input_ids"] for row in ROWS]


def pairs_of(rows: Sequence[int]) -> Pairs:
    chosen, rejected = (
        [TOKENIZER(ROWS[i][side])["input_ids"] + [SPECIAL.eos[0]] for i in rows] for side in ("chosen", "rejected")
    )
    return Pairs.from_lists([PROMPTS[i] for i in rows], chosen, rejected, pad=SPECIAL.pad)


def perturbed(model: Any, seed: int = 1) -> Any:
    """A policy that is no longer the reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return model


def models(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    policy, reference = perturbed(make_model(architecture)).to(dtype), make_model(architecture).to(dtype)
    for model in (policy, reference):
        attach_head(model)
    return policy, reference.requires_grad_(False)


def buffer_of(policy: Any, reference: Any, **options: Any) -> KLBuffer:
    given = {"samples": 8, "every": 4, "max_new_tokens": 8, "max_length": 32} | options
    return KLBuffer(PROMPTS, HFSampler(policy, TOKENIZER), Reference(reference), SPECIAL, **given)


class FixedSampler:
    """The same responses for every model, so that models of different dtypes can be compared."""

    def sample(self, prompts: list[list[int]], max_new_tokens: int, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, max_new_tokens + 1, (len(prompts),), generator=generator).tolist()
        return [torch.randint(2, 60, (n,), generator=generator).tolist() for n in lengths]


def step_of(policy: Any, reference: Any, keep: str = "hidden", **settings: Any) -> SPOStep:
    buffer = buffer_of(policy, reference, keep=keep)
    buffer.sampler = FixedSampler()
    settings = {"beta": 0.05} | settings
    return SPOStep(SPOSettings(**settings), buffer if settings["beta"] else None)


def gradient(policy: Any, step: SPOStep, window: Sequence[Pairs]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of an optimizer step."""
    policy.zero_grad()
    policy.train()
    step.begin(policy, window, 0)
    total = 0.0
    for pairs in window:
        loss, _ = step(policy, pairs)
        (loss / len(window)).backward()
        total += loss.item() / len(window)
    return total, {name: p.grad.double() for name, p in policy.named_parameters() if p.grad is not None}


def distance(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Relative, over all parameters."""
    assert ours.keys() == truth.keys()
    error = sum(float((ours[name] - truth[name]).square().sum()) for name in truth)
    return math.sqrt(error / sum(float(value.square().sum()) for value in truth.values()))


WINDOW = [pairs_of(range(4)), pairs_of(range(4, 8))]


class TestGradients:
    """Against plain torch in float64: not more than twice the error of plain torch in float32."""

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"weighting": "soft"},
            {"weighting": "soft", "average_log_probs": True, "nll_weight": 0.3},
            {"packed": True, "nll_weight": 0.3, "center": False},
            {"divergence": "reverse_kl"},
            {"divergence": "jsd", "mixture": 0.3},
        ],
        ids=lambda settings: "-".join(map(str, settings)) or "plain",
    )
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_heads(self, architecture: str, settings: dict[str, Any]) -> None:
        if architecture != "llama" and "packed" in settings:
            settings = {**settings, "packed": False}
        policy, reference = models(architecture, torch.float64)
        exact_loss, exact = gradient(policy, step_of(policy, reference, head="eager", **settings), WINDOW)
        errors = {}
        for head in ("eager", "linear", "logits"):
            policy, reference = models(architecture)
            loss, ours = gradient(policy, step_of(policy, reference, head=head, **settings), WINDOW)
            errors[head] = distance(ours, exact)
            assert loss == pytest.approx(exact_loss, rel=1e-5)
        assert errors["linear"] <= 2 * errors["eager"]
        assert errors["logits"] <= 2 * errors["eager"]

    @pytest.mark.parametrize("head", ["linear", "logits"])
    def test_half_precision_under_autocast(self, head: str) -> None:
        policy, reference = models(dtype=torch.float64)
        exact_loss, exact = gradient(policy, step_of(policy, reference, head="eager"), WINDOW)
        errors = {}
        for name in ("eager", head):
            policy, reference = models()
            with torch.autocast("cpu", torch.bfloat16):
                step = step_of(policy, reference, head=name)
                loss, ours = gradient(policy, step, WINDOW)
            errors[name] = distance(ours, exact)
            assert step.buffer is not None
            assert step.buffer.draw is not None
            assert step.buffer.draw.states is not None
            assert step.buffer.draw.states.dtype == torch.bfloat16
            assert loss == pytest.approx(exact_loss, rel=0.02)
        assert errors[head] <= 2 * errors["eager"]

    @pytest.mark.parametrize("head", ["linear", "logits"])
    def test_what_the_buffer_keeps_makes_no_difference(self, head: str) -> None:
        results = []
        for keep in ("hidden", "recompute", *(["logits"] if head == "logits" else [])):
            policy, reference = models("gemma2")
            results.append(gradient(policy, step_of(policy, reference, keep=keep, head=head), WINDOW))
        for loss, ours in results[1:]:
            assert loss == pytest.approx(results[0][0], rel=1e-6)
            assert distance(ours, results[0][1]) < 1e-6

    @pytest.mark.parametrize("head", ["linear", "logits"])
    @pytest.mark.parametrize("sizes", [(4, 4), (2, 2, 2, 2), (3, 3, 2), (7, 1)])
    def test_accumulation_is_one_big_batch(self, sizes: tuple[int, ...], head: str) -> None:
        """Soft weights, NLL and KL included, though 3 micro-batches do not divide 8 pairs or 8 samples."""
        settings = {"weighting": "soft", "nll_weight": 0.5, "head": head}
        policy, reference = models()
        whole = gradient(policy, step_of(policy, reference, **settings), [pairs_of(range(8))])
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        window = [pairs_of(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
        policy, reference = models()
        loss, ours = gradient(policy, step_of(policy, reference, **settings), window)
        assert loss == pytest.approx(whole[0], rel=1e-5)
        assert distance(ours, whole[1]) < 5e-6

    def test_kl_of_a_policy_that_is_the_reference_is_rounding(self) -> None:
        policy, reference = make_model(), make_model()
        for model in (policy, reference):
            attach_head(model)
        step = step_of(policy, reference.requires_grad_(False))
        step.begin(policy, WINDOW, 0)
        assert abs(step(policy, WINDOW[0]).metrics.means()["spo/kl"]) < 1e-6

    def test_packed_rows_give_the_same(self) -> None:
        results = []
        for packed in (False, True):
            policy, reference = models()
            step = step_of(policy, reference, packed=packed, weighting="soft", nll_weight=0.3)
            results.append(gradient(policy, step, WINDOW))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
        assert distance(results[0][1], results[1][1]) < 1e-5

    def test_beta_0_needs_neither_samples_nor_reference(self) -> None:
        policy, _ = models()
        step = SPOStep(SPOSettings(beta=0.0))
        loss, _ = gradient(policy, step, WINDOW)
        assert math.isfinite(loss)

    def test_center_leaves_out_the_constant(self) -> None:
        policy, reference = models()
        shift = math.log(2) / 0.1
        centred = gradient(policy, step_of(policy, reference), WINDOW)
        plain = gradient(policy, step_of(policy, reference, center=False), WINDOW)
        assert plain[0] == pytest.approx(centred[0] + shift, rel=1e-5)
        assert distance(plain[1], centred[1]) < 1e-6


class TestNormalizers:
    def test_step_is_batch_for_one_micro_batch(self) -> None:
        results = []
        for normalizer in ("step", "batch"):
            policy, reference = models()
            step = step_of(policy, reference, weighting="soft", normalizer=normalizer)
            results.append(gradient(policy, step, [pairs_of(range(8))]))
        assert distance(results[0][1], results[1][1]) < 1e-6

    def test_batch_differs_from_step_over_several(self) -> None:
        results = []
        for normalizer in ("step", "batch"):
            policy, reference = models()
            step = step_of(policy, reference, weighting="soft", normalizer=normalizer)
            results.append(gradient(policy, step, WINDOW))
        assert distance(results[0][1], results[1][1]) > 1e-4

    def test_ema_moves_once_a_micro_batch_and_not_in_evaluation(self) -> None:
        policy, reference = models()
        step = step_of(policy, reference, weighting="soft", normalizer="ema")
        gradient(policy, step, WINDOW)
        assert step.importance is not None
        assert step.importance.num_updates == 2
        before = step.importance.running_mean.clone()
        with evaluating(policy):
            metrics = step.evaluate(policy, WINDOW[0]).metrics.means()
        assert (step.importance.running_mean, step.importance.num_updates) == (before, 2)
        assert metrics["spo/normalizer"] == pytest.approx(before.item())


class TestMetrics:
    def test_values(self) -> None:
        policy, reference = models(dtype=torch.float64)
        step = step_of(policy, reference, head="eager", weighting="soft", reference_rewards=True)
        step.begin(policy, WINDOW, 0)
        sums = [step(policy, pairs).metrics for pairs in WINDOW]
        got = (sums[0] + sums[1]).means()
        pairs = pairs_of(range(8))
        logps, references = ([sequence_logps(m, pairs, i) for i in range(16)] for m in (policy, reference))
        chosen, rejected = (torch.tensor(x, dtype=torch.float64) for x in (logps[:8], logps[8:]))
        ref_chosen, ref_rejected = (torch.tensor(x, dtype=torch.float64) for x in (references[:8], references[8:]))
        scores = 0.1 * torch.logaddexp(chosen, rejected)
        mu = torch.sigmoid(scores - scores.mean())
        assert step.buffer is not None
        draw = step.buffer.draw
        assert draw is not None
        lengths = [len(response) for response in draw.samples.responses()]
        expected = {
            "logps/chosen": chosen.mean(),
            "logps/rejected": rejected.mean(),
            "rewards/accuracies": (chosen > rejected).double().mean(),
            "rewards/margins": 0.1 * (chosen - ref_chosen - rejected + ref_rejected).mean(),
            "rewards/chosen": 0.1 * (chosen - ref_chosen).mean(),
            "rewards/rejected": 0.1 * (rejected - ref_rejected).mean(),
            "spo/preference_error": torch.sigmoid(-0.1 * (chosen - rejected)).mean(),
            "spo/mu": mu.mean(),
            "spo/mu_std": mu.std(correction=0),
            "spo/normalizer": scores.mean(),
            "spo/sample_length": sum(lengths) / len(lengths),
            "spo/sample_eos_rate": sum(r[-1:] == [2] for r in draw.samples.responses()) / len(lengths),
            "spo/sample_age": 0,
            "spo/draw_seconds": draw.seconds,
        }
        for name, value in expected.items():
            assert got[name] == pytest.approx(float(value), rel=1e-6), name
        assert got["spo/kl_per_token"] == pytest.approx(got["spo/kl"] * len(lengths) / sum(lengths))
        assert got.keys() == expected.keys() | {"spo/loss", "spo/kl", "spo/kl_per_token", "entropy"}

    def test_names_are_those_of_the_settings(self) -> None:
        policy, _ = models()
        step = SPOStep(SPOSettings(beta=0.0))
        step.begin(policy, WINDOW, 0)
        assert step(policy, WINDOW[0]).metrics.means().keys() == {
            "logps/chosen",
            "logps/rejected",
            "rewards/accuracies",
            "rewards/margins",
            "spo/loss",
            "spo/preference_error",
        }

    @pytest.mark.parametrize("head", ["linear", "logits"])
    def test_evaluation_adds_beta_kl_and_leaves_training_alone(self, head: str) -> None:
        policy, reference = models()
        step = step_of(policy, reference, head=head, weighting="soft")
        with evaluating(policy):
            before = step.evaluate(policy, WINDOW[0])
            kl = step.evaluation_kl(policy, batch_size=3)
            again = step.evaluate(policy, WINDOW[0], kl)
        assert step.buffer is not None
        assert step.buffer.draw is None
        means = before.metrics.means()
        assert before.loss.item() == pytest.approx(means["spo/loss"] + 0.05 * means["spo/kl"], rel=1e-5)
        assert again.loss.item() == pytest.approx(before.loss.item(), rel=1e-6)
        policy_after, reference_after = models()
        fresh = step_of(policy_after, reference_after, head=head, weighting="soft")
        assert gradient(policy, step, WINDOW)[0] == gradient(policy_after, fresh, WINDOW)[0]


def sequence_logps(model: Any, pairs: Pairs, row: int) -> float:
    """Log-prob of one response, by itself."""
    length = int(pairs.attention_mask[row].sum())
    with torch.no_grad():
        log_p = model(pairs.ids[row : row + 1, :length]).logits[0].log_softmax(-1)
    return sum(float(log_p[i - 1, pairs.ids[row, i]]) for i in range(1, length) if pairs.response[row, i])


class TestSampler:
    def test_draws_from_the_policy_itself(self) -> None:
        """Though the model's own generation_config wants something else, and ids beyond the tokenizer are likely."""
        model = make_model(vocab=len(TOKENIZER) + 8).double()
        with torch.no_grad():
            model.lm_head.weight[len(TOKENIZER) :] *= 5
        poisoned = {"temperature": 0.2, "top_k": 3, "top_p": 0.5, "repetition_penalty": 3.0, "min_new_tokens": 3}
        model.generation_config.update(do_sample=True, bad_words_ids=[[7]], **poisoned)
        own = copy.deepcopy(model.generation_config)
        draws = 4000
        responses = HFSampler(model, TOKENIZER, batch_size=1000).sample([[5, 6, 7]] * draws, 1, seed=3)
        assert model.generation_config == own
        with torch.no_grad():
            logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1, : len(TOKENIZER)]
        p = logits.softmax(-1)
        counts = torch.bincount(torch.tensor([r[0] for r in responses]), minlength=len(TOKENIZER))
        assert len(counts) == len(TOKENIZER)
        chi_square = ((counts - draws * p).square() / (draws * p)).sum().item()
        degrees = len(TOKENIZER) - 1
        assert chi_square < degrees + 5 * math.sqrt(2 * degrees)

    def test_left_padding_does_not_change_what_is_sampled(self) -> None:
        model = make_model().double()
        with torch.no_grad():
            model.lm_head.weight *= 1e4  # greedy: each batch has random numbers of its own
        sampler = HFSampler(model, TOKENIZER)
        prompts = [[5], [6, 7, 8, 9, 10, 11], [12, 13]]
        together = sampler.sample(prompts, 6, seed=1)
        assert together == [sampler.sample([prompt], 6, seed=1)[0] for prompt in prompts]

    def test_leaves_global_random_states_alone(self) -> None:
        torch.manual_seed(5)
        expected = torch.initial_seed(), torch.rand(3)
        model = make_model()
        torch.manual_seed(5)
        first = HFSampler(model, TOKENIZER).sample([[5]] * 3, 5, seed=1)
        assert torch.initial_seed() == expected[0]
        assert torch.equal(torch.rand(3), expected[1])
        torch.manual_seed(77)
        assert HFSampler(model, TOKENIZER).sample([[5]] * 3, 5, seed=1) == first
        assert HFSampler(model, TOKENIZER).sample([[5]] * 3, 5, seed=2) != first

    def test_keeps_training_mode_and_eos(self) -> None:
        model = make_model()
        with torch.no_grad():
            model.lm_head.weight[2] = 0
            model.lm_head.weight[[i for i in range(64) if i != 2]] *= 0.01
        model.train()
        responses = HFSampler(model, TOKENIZER).sample([[5]] * 64, 200, seed=1)
        assert model.training
        assert all(r[-1] == 2 and r.count(2) == 1 for r in responses if len(r) < 200)
        assert any(len(r) < 200 for r in responses)

    def test_every_eos_of_the_model_ends_a_response(self) -> None:
        model = make_model()
        model.generation_config.eos_token_id = [2, 9, 10]
        responses = HFSampler(model, TOKENIZER).sample([[5]] * 64, 100, seed=1)
        assert {r[-1] for r in responses if len(r) < 100} == {2, 9, 10}
        assert not any({2, 9, 10} & set(r[:-1]) for r in responses)

    @pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "do_sample", "repetition_penalty", "min_p"])
    def test_refuses_options_that_change_the_distribution(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"generation_options must not hold {name}: .*temperature 1, no top-k"):
            HFSampler(make_model(), TOKENIZER, generation_options={name: 1})
        HFSampler(make_model(), TOKENIZER, generation_options={"use_cache": False}).sample([[5]], 2, seed=0)

    def test_needs_an_eos(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="tokenizer must have an eos token"):
            HFSampler(make_model(), tokenizer)


class TestBuffer:
    def test_draws_every_k_steps_and_resumes(self) -> None:
        policy, reference = models()
        buffer = buffer_of(policy, reference)
        drawn, kept = [], None
        for step in range(9):
            buffer.refresh(step)
            assert buffer.draw is not None
            drawn.append(buffer.draw)
            if step == 5:
                kept = pickle.loads(pickle.dumps(buffer.state_dict()))
        assert [draw.step for draw in drawn] == [0] * 4 + [4] * 4 + [8]
        prompts = [
            tuple(ids[:length])
            for draw in (drawn[0], drawn[4])
            for ids, length in zip(draw.samples.ids.tolist(), draw.samples.prompt_lengths.tolist(), strict=True)
        ]
        assert sorted(prompts) == sorted(map(tuple, PROMPTS))  # 16 prompts, each once in two draws of 8
        other = buffer_of(policy, reference)
        assert kept is not None
        other.load_state_dict(kept)
        other.refresh(6)
        assert other.draw is not None
        assert torch.equal(other.draw.samples.ids, drawn[5].samples.ids)
        assert other.draw.states is not None
        assert drawn[5].states is not None
        assert torch.equal(other.draw.states, drawn[5].states)
        other.refresh(8)
        assert torch.equal(other.draw.samples.ids, drawn[8].samples.ids)

    def test_ranks_share_the_prompts(self) -> None:
        policy, reference = models()
        whole = buffer_of(policy, reference)._prompts(3)
        parts = [buffer_of(policy, reference, rank=rank, world_size=2)._prompts(3) for rank in range(2)]
        assert parts[0] + parts[1] == whole

    def test_another_number_of_ranks_draws_anew(self) -> None:
        policy, reference = models()
        buffer = buffer_of(policy, reference)
        buffer.refresh(0)
        other = buffer_of(policy, reference, world_size=2)
        with pytest.warns(UserWarning, match="the saved samples are 8 on 1 ranks, not 8 on 2: new ones are drawn"):
            other.load_state_dict(buffer.state_dict())
        assert other.draw is None

    def test_a_changed_reference_is_scored_again(self) -> None:
        policy, reference = models()
        step = step_of(policy, reference)
        gradient(policy, step, WINDOW)
        perturbed(reference, seed=9)
        assert step.buffer is not None
        step.buffer.reference_changed()
        step.begin(policy, WINDOW, 1)
        ours = step(policy, WINDOW[0]).metrics.means()["spo/kl"]
        fresh = step_of(policy, reference, keep="recompute")
        fresh.begin(policy, WINDOW, 0)
        assert ours == pytest.approx(fresh(policy, WINDOW[0]).metrics.means()["spo/kl"], rel=1e-6)

    def test_parts_lose_the_padding_of_the_others(self) -> None:
        policy, reference = models()
        step = step_of(policy, reference)
        step.begin(policy, WINDOW, 0)
        assert step.buffer is not None
        assert step.buffer.draw is not None
        draw = step.buffer.draw
        for row, length in enumerate(draw.lengths):
            part = draw.part(slice(row, row + 1))
            assert part.ids.tolist() == [draw.samples.ids[row, :length].tolist()]
            assert part.attention_mask.all()
        assert len(draw.part(slice(3, 3))) == 0

    def test_hidden_states_are_small(self) -> None:
        policy, reference = models()
        sizes = {}
        for keep in ("hidden", "logits", "recompute"):
            buffer = buffer_of(policy, reference, keep=keep)
            buffer.refresh(0)
            assert buffer.draw is not None
            sizes[keep] = buffer.draw.bytes()
        assert sizes["recompute"] == 0
        assert sizes["logits"] * 32 == sizes["hidden"] * 64  # V = 64, H = 32

    def test_long_prompts_lose_their_beginning(self) -> None:
        policy, reference = models()
        buffer = buffer_of(policy, reference, max_length=10, max_new_tokens=8)
        assert all(len(prompt) == 2 for prompt in buffer._prompts(0))
        assert buffer._prompt(0) == PROMPTS[0][-2:]

    def test_empty_prompts_become_bos_or_are_refused(self) -> None:
        policy, reference = models()
        sampler = HFSampler(policy, TOKENIZER)
        buffer = KLBuffer([[]], sampler, Reference(reference), SPECIAL, samples=1)
        assert buffer._prompts(0) == [[1]]
        without = SPECIAL._replace(bos=None)
        buffer = KLBuffer([[]], sampler, Reference(reference), without, samples=1)
        with pytest.raises(ValueError, match="prompts must not be empty, as the tokenizer has no bos: .* in row 0"):
            buffer.refresh(0)

    def test_empty_responses_warn_and_have_kl_0(self) -> None:
        policy, reference = models()
        step = step_of(policy, reference)
        assert step.buffer is not None

        class Silent:
            def sample(self, prompts: list[list[int]], max_new_tokens: int, seed: int) -> list[list[int]]:
                return [[] for _ in prompts]

        step.buffer.sampler = Silent()
        with pytest.warns(UserWarning, match="all sampled responses are empty: the KL is 0"):
            step.begin(policy, WINDOW, 0)
        result = step(policy, WINDOW[0])
        result.loss.backward()
        assert result.metrics.means()["spo/kl"] == 0

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"samples": 7, "world_size": 2}, "samples must be a multiple of world_size = 2, got 7; the next is 8"),
            ({"samples": 0}, "samples must be an integer >= 1, got 0"),
            ({"every": 1.5}, "every must be an integer >= 1, got 1.5"),
            ({"max_new_tokens": 32}, "max_new_tokens must be < max_length = 32"),
            ({"keep": "states"}, "keep must be one of hidden, logits, recompute, got 'states'"),
        ],
    )
    def test_errors(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            buffer_of(*models(), **change)


class TestHead:
    def test_a_copy_runs_itself(self) -> None:
        model = make_model()
        attach_head(model)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight.zero_()
        ids = torch.tensor([[5, 6]])
        assert (other(ids, spo_logits=lambda logits: logits) == 0).all()
        assert (other(ids, spo_head=lambda hidden, weight, bias, options: weight) == 0).all()
        assert (other(ids).logits == 0).all()
        assert (model(ids).logits != 0).any()

    def test_attaching_twice_changes_nothing(self) -> None:
        model = make_model()
        attach_head(model)
        forward = model.forward
        attach_head(model)
        assert model.forward == forward

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_hidden_states_and_options_give_the_logits(self, architecture: str) -> None:
        model = make_model(architecture)
        attach_head(model)
        ids = torch.tensor([[5, 6, 7]])
        reference = Reference(model)
        hidden = reference.hidden({"input_ids": ids})
        torch.testing.assert_close(reference.logits_of(hidden), model(ids).logits)

    def test_unknown_transforms_leave_only_the_logits(self) -> None:
        model = make_model()
        model.config.logit_cap = 3.0
        attach_head(model)
        ids = torch.tensor([[5, 6]])
        with pytest.raises(ValueError, match="config has logit_cap = 3"):
            model(ids, spo_head=lambda *_: None)
        assert model(ids, spo_logits=lambda logits: logits).shape == (1, 2, 64)

    def test_models_without_head_are_refused(self) -> None:
        sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim"), 8)
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
        with pytest.raises(ValueError, match="model must have output embeddings with a weight, got LlamaModel"):
            attach_head(transformers.LlamaModel(config))

    def test_an_adapter_on_the_head_is_refused_whenever_it_comes(self) -> None:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
        with pytest.raises(ValueError, match="model must have no adapter on its head"):
            attach_head(peft.get_peft_model(make_model(), config))
        model = make_model()
        attach_head(model)
        adapted = peft.get_peft_model(model, config)
        with pytest.raises(ValueError, match="model must have no adapter on its head"):
            adapted(torch.tensor([[1, 2]]), spo_head=lambda hidden, *_: hidden)

    def test_other_modules_bring_backbone_and_head(self) -> None:
        class Bigrams(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = torch.nn.Embedding(64, 8)
                self.out = torch.nn.Linear(8, 64)

            def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
                return self.out(self.embedding(input_ids))

        policy, reference = Bigrams(), Bigrams().requires_grad_(False)
        for model in (policy, reference):
            attach_head(
                model, options={}, backbone=lambda m, input_ids, **_: m.embedding(input_ids), head=lambda m: m.out
            )
        results = []
        for head in ("linear", "logits"):
            buffer = KLBuffer(
                PROMPTS,
                FixedSampler(),
                Reference(reference, head=reference.out),
                SPECIAL,
                samples=4,
                max_new_tokens=8,
                keep="recompute",
            )
            results.append(gradient(policy, SPOStep(SPOSettings(head=head), buffer), WINDOW))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
        assert distance(results[0][1], results[1][1]) < 1e-5


class TestStep:
    def test_errors(self) -> None:
        policy, reference = models()
        buffer = buffer_of(policy, reference)
        with pytest.raises(ValueError, match="buffer must be given exactly where beta > 0, got None with beta = 0.03"):
            SPOStep(SPOSettings())
        with pytest.raises(ValueError, match="got a KLBuffer with beta = 0"):
            SPOStep(SPOSettings(beta=0), buffer)
        with pytest.raises(ValueError, match='keep must be "hidden" or "recompute" for the head "linear"'):
            SPOStep(SPOSettings(), buffer_of(policy, reference, keep="logits"))
        with pytest.raises(ValueError, match="reference must be given for reference_rewards"):
            SPOStep(SPOSettings(beta=0, reference_rewards=True))
        for name, value in {"alpha": -1, "beta": math.nan, "gamma": "x", "nll_weight": math.inf}.items():
            with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0"):
                SPOSettings(**{name: value})
        for name in ("weighting", "normalizer", "head"):
            with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'x'"):
                SPOSettings(**{name: "x"})
        step = SPOStep(SPOSettings(), buffer)
        with pytest.raises(ValueError, match="window must hold a micro-batch"):
            step.begin(policy, [], 0)
        step.begin(policy, WINDOW[:1], 0)
        step(policy, WINDOW[0])
        with pytest.raises(RuntimeError, match="begin.. announced 1 micro-batches, got another"):
            step(policy, WINDOW[1])

    def test_a_reference_with_other_options_of_the_head_is_refused(self) -> None:
        policy, _ = models()
        _, reference = models("gemma2")
        step = step_of(policy, reference)
        step.begin(policy, WINDOW, 0)
        with pytest.raises(ValueError, match="the policy's options of the head, got .*'softcap': 3.0"):
            step(policy, WINDOW[0])

    def test_one_forward_for_pairs_and_samples(self) -> None:
        policy, reference = models()
        step = step_of(policy, reference)
        step.begin(policy, WINDOW, 0)
        calls = []
        policy.model.register_forward_hook(lambda *_: calls.append(1))
        reference.model.register_forward_hook(lambda *_: calls.append(1))
        step(policy, WINDOW[0])
        assert len(calls) == 1

    @pytest.mark.parametrize("normalizer", ["step", "ema"])
    def test_a_resumed_run_has_the_same_bits(self, normalizer: str) -> None:
        def run(steps: int, saved: dict[str, Any] | None = None) -> tuple[list[float], dict[str, Any]]:
            policy, reference = models()
            step = SPOStep(
                SPOSettings(beta=0.05, weighting="soft", normalizer=normalizer), buffer_of(policy, reference)
            )
            optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
            first = 0
            if saved is not None:
                policy.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                step.load_state_dict(saved["step"])
                first = saved["first"]
            losses = []
            for number in range(first, steps):
                loss, _ = gradient(policy, step, WINDOW) if number == 0 else advance(policy, step, number)
                optimizer.step()
                losses.append(loss)
            state = {"model": policy.state_dict(), "optimizer": optimizer.state_dict(), "step": step.state_dict()}
            return losses, pickle.loads(pickle.dumps({**state, "first": steps}))

        def advance(policy: Any, step: SPOStep, number: int) -> tuple[float, None]:
            policy.zero_grad()
            step.begin(policy, WINDOW, number)
            total = 0.0
            for pairs in WINDOW:
                loss, _ = step(policy, pairs)
                (loss / 2).backward()
                total += loss.item()
            return total, None

        whole, end = run(7)
        _, half = run(3)
        rest, resumed = run(7, half)
        assert rest == whole[3:]
        for name, value in end["model"].items():
            assert torch.equal(resumed["model"][name], value)

    def test_states_of_other_settings_are_refused(self) -> None:
        policy, reference = models()
        soft = step_of(policy, reference, weighting="soft").state_dict()
        with pytest.raises(ValueError, match="the state must be of the same beta and weighting, got importance with"):
            step_of(policy, reference).load_state_dict(soft)


@pytest.mark.parametrize("packed", [False, True])
def test_joined_rows_have_the_logits_of_single_sequences(packed: bool) -> None:
    model = make_model().double()
    samples = Samples.from_lists(PROMPTS[:3], [[5, 6], [7], [8, 9, 10]], eos=2, pad=0)
    rows = join_rows(WINDOW[0], samples, packed=packed)
    with torch.no_grad():
        _, together = rows.split(model(**rows.model_inputs(), use_cache=False).logits)
        alone = [model(ids[None, :n]).logits[0] for ids, n in zip(samples.ids, samples.lengths, strict=True)]
    if not packed:
        together = torch.cat([logits[: len(own)] for logits, own in zip(together, alone, strict=True)])
    torch.testing.assert_close(together, torch.cat(alone))
