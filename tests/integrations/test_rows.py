"""Batches of pairs and samples: padding, masks, and the way from left-padded to right-padded."""

from __future__ import annotations

import pytest
import torch

from spo_kernels.integrations.rows import IGNORE_INDEX, Pairs, Samples, join_rows

PAD, EOS = 0, 2
PROMPTS = [[5, 6, 7], [8], [9, 10]]
RESPONSES = [[11, EOS], [12, 13, 14, 15], []]


def generated(prompts: list[list[int]], responses: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``generate`` returns for left-padded prompts, and the attention mask that it was given."""
    width, most = max(map(len, prompts)), max(map(len, responses))
    left = [[PAD] * (width - len(p)) + p for p in prompts]
    rows = [p + r + [PAD] * (most - len(r)) for p, r in zip(left, responses, strict=True)]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(rows), torch.tensor(mask)


class TestSamples:
    @pytest.mark.parametrize("by", ["attention_mask", "prompt_lengths"])
    @pytest.mark.parametrize("pad_is_eos", [False, True])
    def test_from_generate_is_from_lists(self, by: str, pad_is_eos: bool) -> None:
        responses = [[11, EOS], [12, 13, 14, 15], [EOS]]
        output, mask = generated(PROMPTS, responses)
        pad = PAD
        if pad_is_eos:
            pad, output = EOS, output.where(output != PAD, EOS)
        given = {"attention_mask": mask} if by == "attention_mask" else {"prompt_lengths": mask.sum(1)}
        samples = Samples.from_generate(output, eos=EOS, pad=pad, **given)
        expected = Samples.from_lists(PROMPTS, responses, eos=EOS, pad=pad)
        for name, value in vars(expected).items():
            assert torch.equal(getattr(samples, name), value), name
        assert samples.ids.tolist() == [[5, 6, 7, 11, EOS], [8, 12, 13, 14, 15], [9, 10, EOS, pad, pad]]
        assert samples.responses() == responses
        assert samples.finished.tolist() == [True, False, True]

    def test_what_follows_the_first_eos_is_cut_off(self) -> None:
        output = torch.tensor([[5, 11, 7, 12, EOS], [6, EOS, 3, 3, 3]])
        samples = Samples.from_generate(output, eos=(EOS, 7), pad=PAD, prompt_lengths=torch.tensor([1, 1]))
        assert samples.responses() == [[11, 7], [EOS]]
        assert samples.finished.tolist() == [True, True]
        assert samples.ids.tolist() == [[5, 11, 7], [6, EOS, PAD]]

    def test_mask_has_the_rows_that_predict_the_response(self) -> None:
        samples = Samples.from_lists(PROMPTS, RESPONSES, eos=EOS, pad=PAD)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            predicted = samples.ids[row, 1:][samples.mask[row, :-1]].tolist()
            assert predicted == response
            assert samples.attention_mask[row].sum() == len(prompt) + len(response)
        assert not samples.mask[:, -1].any()

    def test_no_new_token(self) -> None:
        output, mask = generated(PROMPTS, [[]] * 3)
        samples = Samples.from_generate(output, eos=EOS, pad=PAD, attention_mask=mask)
        assert samples.responses() == [[], [], []]
        assert not samples.mask.any()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({}, "one of prompt_lengths and attention_mask must be given"),
            ({"attention_mask": torch.ones(2, 5), "prompt_lengths": torch.ones(2)}, "got both or none"),
            ({"attention_mask": torch.ones(3, 2)}, r"attention_mask must be \[2, W\] with W <= 4, got \[3, 2\]"),
            ({"attention_mask": torch.tensor([[1, 0], [1, 1]])}, "attention_mask must be 0 on the left only"),
            (
                {"attention_mask": torch.tensor([[0, 0], [0, 1]])},
                "prompts must have a token at least, got none in row 0",
            ),
            ({"prompt_lengths": torch.tensor([5, 1])}, "prompt_lengths must be at most the 4 columns"),
            ({"prompt_lengths": torch.tensor([1])}, r"prompt_lengths must be \[2\], got \[1\]"),
        ],
    )
    def test_errors(self, change: dict[str, torch.Tensor], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Samples.from_generate(torch.ones(2, 4, dtype=torch.int64), eos=EOS, pad=PAD, **change)


class TestPairs:
    def test_labels_are_the_responses(self) -> None:
        pairs = Pairs.from_lists([[5, 6], [7]], [[11, 12], [13]], [[14], [15, 16, 17]], pad=PAD)
        assert len(pairs) == 2
        answers = [[11, 12], [13], [14], [15, 16, 17]]
        for labels, answer in zip(pairs.labels, answers, strict=True):
            assert labels[labels != IGNORE_INDEX].tolist() == answer
        assert pairs.ids[0].tolist() == [5, 6, 11, 12]

    def test_long_sequences_lose_their_end(self) -> None:
        pairs = Pairs.from_lists([[5, 6]], [[11, 12, 13]], [[14]], pad=PAD, max_length=4)
        assert pairs.ids.tolist() == [[5, 6, 11, 12], [5, 6, 14, PAD]]

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="chosen must have a token in every row, got none in row 1"):
            Pairs.from_lists([[1], [1]], [[1], []], [[1], [1]], pad=PAD)
        with pytest.raises(ValueError, match="must be of one length, got 1, 2, 1"):
            Pairs.from_lists([[1]], [[1], [1]], [[1]], pad=PAD)
        with pytest.raises(ValueError, match=r"ids must be \[2P, T\], chosen and then rejected, got \[3, 4\]"):
            Pairs(*(torch.zeros(3, 4, dtype=d) for d in (torch.int64, torch.bool, torch.bool)))
        with pytest.raises(ValueError, match=r"response must be \[2, 4\] bool, got \[2, 4\] torch.int64"):
            Pairs(*(torch.zeros(2, 4, dtype=d) for d in (torch.int64, torch.bool, torch.int64)))


@pytest.mark.parametrize("samples", [None, Samples.from_lists(PROMPTS, RESPONSES, eos=EOS, pad=PAD)])
@pytest.mark.parametrize("packed", [False, True])
def test_joined_rows_hold_both(packed: bool, samples: Samples | None) -> None:
    pairs = Pairs.from_lists([[5, 6], [7]], [[11, 12], [13]], [[14], [15, 16, 17]], pad=PAD)
    rows = join_rows(pairs, samples, packed=packed)
    of_pairs, of_samples = rows.split(rows.ids[..., None])
    labels, mask = rows.labels.flatten(), rows.kl_mask.flatten()
    predicted = of_pairs.flatten().roll(-1)[labels != IGNORE_INDEX]
    assert predicted.tolist() == [11, 12, 13, 14, 15, 16, 17]
    assert predicted.tolist() == labels[labels != IGNORE_INDEX].tolist()
    expected = [] if samples is None else [token for response in RESPONSES for token in response]
    assert of_samples.flatten().roll(-1)[mask].tolist() == expected
    if samples is not None:
        states = samples.ids[..., None].float()
        assert torch.equal(rows.of_samples(states, samples).flatten()[mask], of_samples.flatten()[mask].float())
    if packed:
        assert rows.cu_seqlens is not None
        assert rows.kl_cu_seqlens is not None
        assert rows.position_ids is not None
        starts = [*rows.cu_seqlens[:-1].tolist(), *(rows.kl_cu_seqlens[:-1] + rows.cu_seqlens[-1]).tolist()]
        assert (rows.position_ids[0] == 0).nonzero().flatten().tolist() == starts
        assert rows.cu_seqlens.tolist() == [0, 4, 6, 9, 13]
