"""Batches of token ids: preference pairs, sequences sampled from the policy, and both in one batch for one forward.

P pairs, S sampled sequences, T tokens of the longest sequence, N tokens without padding. All are right-padded, so that
a sequence has the same positions, and the same logits, in every batch. Row i of a sequence predicts token i + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device)


def _right_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> Tensor:
    """[B, T] int64; T is 1 at least."""
    width = max([1, *map(len, rows)])
    padded = [[*row, *([pad] * (width - len(row)))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=device).view(len(rows), width)


def _widened(tensor: Tensor, width: int, value: int) -> Tensor:
    return F.pad(tensor, (0, width - tensor.shape[1]), value=value)


@dataclass(frozen=True)
class Pairs:
    """P preference pairs, right-padded: chosen sequences in rows [0:P], the rejected ones of the same pairs in [P:2P].

    Attributes:
        ids: [2P, T] int64.
        attention_mask: [2P, T] bool, False on padding.
        response: [2P, T] bool, True on the tokens of the response.
    """

    ids: Tensor
    attention_mask: Tensor
    response: Tensor

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.ids.shape[0] % 2:
            raise ValueError(f"ids must be [2P, T], chosen and then rejected, got {list(self.ids.shape)}")
        for name in ("attention_mask", "response"):
            mask = getattr(self, name)
            if mask.shape != self.ids.shape or mask.dtype != torch.bool:
                raise ValueError(f"{name} must be {list(self.ids.shape)} bool, got {list(mask.shape)} {mask.dtype}")

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[Sequence[int]],
        chosen: Sequence[Sequence[int]],
        rejected: Sequence[Sequence[int]],
        *,
        pad: int,
        max_length: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Pairs:
        """Pairs of a prompt and two responses each, as token ids.

        Args:
            prompts, chosen, rejected: P lists of ids each. A prompt that begins a response is not part of it.
            pad: id that fills up short sequences.
            max_length: tokens of a sequence at most; the end of a longer one is cut off. None: as long as they are.
            device: where the tensors lie.

        Raises:
            ValueError: the three differ in length, or a response is empty.
        """
        if not len(prompts) == len(chosen) == len(rejected):
            lengths = f"{len(prompts)}, {len(chosen)}, {len(rejected)}"
            raise ValueError(f"prompts, chosen and rejected must be of one length, got {lengths}")
        for name, responses in (("chosen", chosen), ("rejected", rejected)):
            for row, response in enumerate(responses):
                if not len(response):
                    raise ValueError(f"{name} must have a token in every row, got none in row {row}")
        starts = [len(prompt) for prompt in prompts] * 2
        rows = [[*p, *r][:max_length] for p, r in zip([*prompts, *prompts], [*chosen, *rejected], strict=True)]
        ids = _right_padded(rows, pad, device)
        ends = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device)[:, None]
        first = torch.tensor(starts, dtype=torch.int64, device=device)[:, None]
        real = _positions(ids) < ends
        return cls(ids, real, real & (_positions(ids) >= first))

    def __len__(self) -> int:
        return self.ids.shape[0] // 2

    @property
    def labels(self) -> Tensor:
        """[2P, T] int64: the token that each row predicts, `IGNORE_INDEX` where that is no token of a response."""
        return F.pad(self.ids.masked_fill(~self.response, IGNORE_INDEX)[:, 1:], (0, 1), value=IGNORE_INDEX)


@dataclass(frozen=True)
class Samples:
    """S sequences sampled from the policy, right-padded.

    Attributes:
        ids: [S, T] int64; prompt, response with the eos that ended it, padding.
        prompt_lengths: [S] int64.
        lengths: [S] int64, tokens of prompt and response.
        finished: [S] bool, whether an eos ended the response.
    """

    ids: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    finished: Tensor

    @classmethod
    def from_generate(
        cls,
        output_ids: Tensor,
        *,
        eos: int | Sequence[int],
        pad: int,
        prompt_lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Samples:
        """The output of ``generate`` on left-padded prompts, right-padded, each response cut off after its first eos.

        Args:
            output_ids: [S, W + N] int64, W columns of left-padded prompts and N of responses.
            eos: id, or ids, that end a response. May be the id of the padding.
            pad: id that fills up short sequences.
            prompt_lengths: [S] int64, tokens of the prompts; W is the longest of them. Or
            attention_mask: [S, W], 0 on the prompts' padding, as it was given to ``generate``.

        Raises:
            ValueError: not exactly one of prompt_lengths and attention_mask; a shape is wrong; an empty prompt; padding
                that is not on the left.
        """
        if (prompt_lengths is None) == (attention_mask is None):
            raise ValueError("one of prompt_lengths and attention_mask must be given, got both or none")
        if output_ids.dim() != 2 or output_ids.dtype != torch.int64:
            raise ValueError(f"output_ids must be [S, T] int64, got {list(output_ids.shape)} {output_ids.dtype}")
        count, total = output_ids.shape
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[0] != count or attention_mask.shape[1] > total:
                raise ValueError(
                    f"attention_mask must be [{count}, W] with W <= {total}, got {list(attention_mask.shape)}"
                )
            if (attention_mask.bool().int().diff(dim=1) < 0).any():
                raise ValueError("attention_mask must be 0 on the left only: generate needs left-padded prompts")
            width = attention_mask.shape[1]
            prompt_lengths = attention_mask.bool().sum(1)
        else:
            assert prompt_lengths is not None
            if prompt_lengths.shape != (count,):
                raise ValueError(f"prompt_lengths must be [{count}], got {list(prompt_lengths.shape)}")
            width = int(prompt_lengths.max()) if count else 0
            if width > total:
                raise ValueError(f"prompt_lengths must be at most the {total} columns of output_ids, got {width}")
        if (prompt_lengths < 1).any():
            raise ValueError(f"prompts must have a token at least, got none in row {int(prompt_lengths.argmin())}")
        responses = output_ids[:, width:]
        ends = torch.isin(responses, torch.tensor(_as_tuple(eos), device=responses.device))
        before = (ends.cumsum(1) - ends.int()) == 0  # no eos before this token
        lengths = prompt_lengths + before.sum(1)
        kept = max(1, int(lengths.max())) if count else 1
        columns = torch.arange(kept, device=output_ids.device)[None] + (width - prompt_lengths)[:, None]
        ids = output_ids.gather(1, columns.clamp(max=max(total - 1, 0)))
        ids = ids.masked_fill(torch.arange(kept, device=ids.device) >= lengths[:, None], pad)
        return cls(ids, prompt_lengths, lengths, ends.any(1))

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        eos: int | Sequence[int],
        pad: int,
        device: torch.device | str = "cpu",
    ) -> Samples:
        """Prompts and their responses as lists of ids. A response ends with its eos, if it reached one, or is empty."""
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        ends = set(_as_tuple(eos))

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            _right_padded(rows, pad, device),
            tensor([len(prompt) for prompt in prompts]),
            tensor([len(row) for row in rows]),
            tensor([int(len(r) > 0 and r[-1] in ends) for r in responses]).bool(),
        )

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def attention_mask(self) -> Tensor:
        """[S, T] bool, False on padding."""
        return _positions(self.ids) < self.lengths[:, None]

    @property
    def mask(self) -> Tensor:
        """[S, T] bool: the rows that predict a token of the response, its eos included."""
        row = _positions(self.ids)
        return (row >= self.prompt_lengths[:, None] - 1) & (row < self.lengths[:, None] - 1)

    def responses(self) -> list[list[int]]:
        """The ids of each response, its eos included."""
        rows = zip(self.ids.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return [ids[start:end] for ids, start, end in rows]

    def to(self, device: torch.device | str) -> Samples:
        return Samples(*(x.to(device) for x in (self.ids, self.prompt_lengths, self.lengths, self.finished)))


def _as_tuple(eos: int | Sequence[int]) -> tuple[int, ...]:
    return (eos,) if isinstance(eos, int) else tuple(eos)


class Rows(NamedTuple):
    """Pairs and samples as one batch, padded [2P + S, T] or packed [1, N], and what `LinearSPOLoss` needs of them.

    Packed, every position counts from the start of its sequence, which is how transformers' attention knows where a
    sequence ends.
    """

    ids: Tensor  # [2P + S, T] or [1, N] int64
    attention_mask: Tensor | None  # [2P + S, T] bool; None if packed
    position_ids: Tensor | None  # [1, N] int64 if packed
    labels: Tensor  # [2P, T], or [N of the pairs] if packed
    kl_mask: Tensor  # [S, T], or [N of the samples] if packed; bool
    cu_seqlens: Tensor | None  # [2P + 1] if packed: where each sequence of the pairs starts
    kl_cu_seqlens: Tensor | None  # [S + 1] if packed, counted from the first row of the samples

    def model_inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of a Hugging Face model's forward."""
        if self.attention_mask is not None:
            return {"input_ids": self.ids, "attention_mask": self.attention_mask.long()}
        assert self.position_ids is not None
        return {"input_ids": self.ids, "position_ids": self.position_ids}

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values [2P + S, T, ..] of the model, of the pairs and of the samples; packed [1, N, ..] as [N, ..] each."""
        if self.cu_seqlens is None:
            return values[: len(self.labels)], values[len(self.labels) :]
        return values[0, : len(self.labels)], values[0, len(self.labels) :]

    def of_samples(self, values: Tensor, samples: Samples) -> Tensor:
        """Values [S, T', ..] of the samples in this batch's layout: [S, T, ..], or packed [N of the samples, ..]."""
        if self.kl_cu_seqlens is not None:
            return values[samples.attention_mask]
        width = self.ids.shape[1]
        return F.pad(values, (*([0, 0] * (values.dim() - 2)), 0, width - values.shape[1]))


def join_rows(pairs: Pairs, samples: Samples | None = None, *, packed: bool = False) -> Rows:
    """One batch out of pairs and samples, for one forward.

    Args:
        pairs: P pairs; P may be 0.
        samples: S sequences on the device of the pairs; None or S = 0: pairs alone.
        packed: without padding, all sequences one after the other. Needs a model whose attention reads sequence ends
            from ``position_ids``, as transformers' do.
    """
    if samples is None:
        samples = Samples.from_lists([], [], eos=0, pad=0, device=pairs.ids.device)
    if packed:
        masks = (pairs.attention_mask, samples.attention_mask)
        both = zip((pairs.ids, samples.ids), masks, strict=True)
        lengths = [mask.sum(1) for mask in masks]
        positions = [_positions(mask).expand_as(mask)[mask] for mask in masks]
        return Rows(
            ids=torch.cat([ids[mask] for ids, mask in both])[None],
            attention_mask=None,
            position_ids=torch.cat(positions)[None],
            labels=pairs.labels[masks[0]],
            kl_mask=samples.mask[masks[1]],
            cu_seqlens=F.pad(lengths[0].cumsum(0), (1, 0)),
            kl_cu_seqlens=F.pad(lengths[1].cumsum(0), (1, 0)),
        )
    width = max(pairs.ids.shape[1], samples.ids.shape[1])
    return Rows(
        ids=torch.cat([_widened(pairs.ids, width, 0), _widened(samples.ids, width, 0)]),
        attention_mask=torch.cat(
            [_widened(pairs.attention_mask, width, 0), _widened(samples.attention_mask, width, 0)]
        ),
        position_ids=None,
        labels=_widened(pairs.labels, width, IGNORE_INDEX),
        kl_mask=_widened(samples.mask, width, 0),
        cu_seqlens=None,
        kl_cu_seqlens=None,
    )
