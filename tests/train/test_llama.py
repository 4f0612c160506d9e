from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from spo_train.files import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE
from spo_train.models.draw import draw
from spo_train.models.llama import (
    Llama,
    ModelConfig,
    load_model,
    load_pretrained,
)
from spo_train.protocol import IGNORE_INDEX, LanguageModel, Sequences
from spo_train.tokenizer import Tokenizer

PROMPTS = [[], [17], [300, 5, 9], [4, 4, 4, 4, 8, 15, 16]]
ZERO_TEMPERATURE = 1e-6


@pytest.fixture
def model(make_model: Callable[..., Llama]) -> Llama:
    return make_model()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_llama(model: Llama, tokens: Tensor) -> Tensor:
    """Logits [T, V] of one sequence, position by position, from the definition of a Llama."""
    config, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    head_dim = config.dim // config.heads

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean() + config.norm_eps).sqrt() * weight

    def rotate(x: Tensor, position: int) -> Tensor:
        pairs = torch.view_as_complex(x.view(config.heads, head_dim // 2, 2))
        angle = position * config.rope_base ** (-torch.arange(0, head_dim, 2).double() / head_dim)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).view(config.heads, head_dim)

    stream = [w["embedding.weight"][t] for t in tokens]
    for layer in range(config.layers):
        block = f"blocks.{layer}."
        keys, values = [], []
        for position, x in enumerate(stream):
            q, k, v = (w[block + "attention.qkv.weight"] @ norm(x, w[block + "attention_norm.weight"])).chunk(3)
            keys.append(rotate(k, position))
            values.append(v.view(config.heads, head_dim))
            scores = torch.einsum("hd,thd->ht", rotate(q, position), torch.stack(keys)) / head_dim**0.5
            mixed = torch.einsum("ht,thd->hd", scores.softmax(-1), torch.stack(values)).flatten()
            x = x + w[block + "attention.out.weight"] @ mixed
            gate, up = (w[block + "ffn.gate_up.weight"] @ norm(x, w[block + "ffn_norm.weight"])).chunk(2)
            stream[position] = x + w[block + "ffn.down.weight"] @ (gate * torch.sigmoid(gate) * up)
    return torch.stack([w["embedding.weight"] @ norm(x, w["norm.weight"]) for x in stream])


def test_logits_are_those_of_a_llama(make_model: Callable[..., Llama]) -> None:
    model = make_model(dtype=torch.float64)
    tokens = torch.tensor([[1, 40, 7, 300, 12, 12, 99], [1, 2, 3, 5, 8, 13, 21]])
    expected = torch.stack([plain_llama(model, row) for row in tokens])
    # The table of rotations is float32, whatever the dtype of the weights, so it is off by 1e-7, relative.
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-6)


def test_rotation_keeps_its_dtype_through_a_cast(model: Llama) -> None:
    rotation = model.rotation.clone()
    assert model.bfloat16().embedding.weight.dtype == torch.bfloat16
    assert torch.equal(model.rotation, rotation)
    assert model.to("meta", torch.float16).rotation.device.type == "meta"


def test_model_fulfils_the_protocol(model: Llama) -> None:
    assert isinstance(model, LanguageModel)
    assert (model.vocab_size, model.max_length) == (model.config.vocab_size, model.config.max_length)


def test_samples_labels_cover_the_response_and_its_eos_only() -> None:
    samples = Sequences(
        torch.tensor([[1, 5, 6, 7, 2], [1, 8, 2, 3, 3], [1, 9, 9, 9, 9]]),
        torch.tensor([3, 1, 2]),
        torch.tensor([5, 3, 5]),
    )
    x = IGNORE_INDEX
    assert samples.labels().tolist() == [[x, x, 7, 2], [8, 2, x, x], [x, 9, 9, 9]]


def test_sample_with_cache_draws_what_full_passes_say(model: Llama) -> None:
    # Near temperature 0 each token is the most likely one given all before it; the prompts have different lengths, so
    # that some rows still read their prompt while others answer.
    samples = model.sample(PROMPTS, max_length=40, temperature=ZERO_TEMPERATURE, generator=generator())
    expected = model(samples.tokens[:, :-1]).argmax(-1)
    labels = samples.labels()
    assert (labels != IGNORE_INDEX).sum() > 60
    assert torch.equal(labels, expected.where(labels != IGNORE_INDEX, IGNORE_INDEX))


def test_sample_layout(model: Llama) -> None:
    prompts = PROMPTS * 25
    samples = model.sample(prompts, max_length=30, temperature=2.0, generator=generator())
    assert samples.tokens.dtype == samples.lengths.dtype == samples.prompt_lens.dtype == torch.int64
    assert samples.tokens.shape[1] == samples.lengths.max()
    assert samples.prompt_lens.tolist() == [1 + len(prompt) for prompt in prompts]
    ends = 0
    for prompt, row, length in zip(prompts, samples.tokens.tolist(), samples.lengths.tolist(), strict=True):
        assert row[: 1 + len(prompt)] == [model.bos_id, *prompt]
        response, padding = row[1 + len(prompt) : length], row[length:]
        assert response
        assert set(padding) <= {model.pad_id}
        assert model.eos_id not in response[:-1]
        assert length == 30 or response[-1] == model.eos_id
        ends += response[-1] == model.eos_id
    # Some rows end before the others, so that the cache is compacted.
    assert 0 < ends < len(prompts)


def test_sample_stops_when_all_have_ended(model: Llama) -> None:
    with torch.no_grad():
        # Every hidden state points at eos.
        model.norm.weight.zero_()
        model.norm.weight[0] = 1
        model.embedding.weight[:, 0] = model.embedding.weight[:, 0].abs()
        model.embedding.weight[model.eos_id, 0] = 1e3
        for name, parameter in model.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                parameter.zero_()
    calls = []
    model.norm.register_forward_hook(lambda *_: calls.append(1))
    samples = model.sample([[], [5, 6]], max_length=40, generator=generator())
    assert samples.tokens.tolist() == [[1, 2, 3, 3], [1, 5, 6, 2]]
    assert samples.lengths.tolist() == [2, 4]
    assert len(calls) == 3


def test_rows_of_a_draw_are_those_of_the_whole(model: Llama) -> None:
    prompts = [[], [30, 31, 32], *PROMPTS]
    first, second = generator(3), generator(3)
    whole = model.sample(prompts, max_length=40, generator=first)
    part = model.sample(prompts, max_length=40, generator=second, rows=slice(1, 3))
    assert part.prompt_lens.tolist() == whole.prompt_lens[1:3].tolist()
    assert part.lengths.tolist() == whole.lengths[1:3].tolist()
    assert torch.equal(part.tokens, whole.tokens[1:3, : part.tokens.shape[1]])
    assert torch.equal(first.get_state(), second.get_state())


def test_sample_is_deterministic_and_rows_are_independent(model: Llama) -> None:
    first = model.sample(PROMPTS, max_length=40, generator=generator(3))
    again = model.sample(PROMPTS, max_length=40, generator=generator(3))
    other = model.sample(PROMPTS, max_length=40, generator=generator(4))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    # Only row 1 changes. Its prompt, and the step at which it ends, must not matter to the other rows.
    changed = model.sample([[], [30, 31], *PROMPTS[2:]], max_length=40, generator=generator(3))
    for row in (0, 2, 3):
        length = int(first.lengths[row])
        assert changed.lengths[row] == length
        assert torch.equal(changed.tokens[row, :length], first.tokens[row, :length])


def test_sample_without_generator_follows_the_global_seed(model: Llama) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = model.sample([[]] * 3, max_length=20)
        torch.manual_seed(5)
        assert torch.equal(model.sample([[]] * 3, max_length=20).tokens, first.tokens)


@pytest.mark.parametrize("training", [True, False])
def test_sample_restores_mode_and_tracks_no_gradient(model: Llama, training: bool) -> None:
    model.train(training)
    samples = model.sample([[]], max_length=4, generator=generator())
    assert model.training is training
    assert not samples.tokens.requires_grad
    with pytest.raises(ValueError, match="temperature"):
        model.sample([[]], max_length=4, temperature=0.0)
    assert model.training is training


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    count = 20000
    uniform = torch.rand(count, dtype=torch.float64, generator=generator())
    drawn = draw(probabilities.log().expand(count, -1), uniform)
    frequencies = drawn.bincount(minlength=6) / count
    # Five standard deviations of the most uncertain frequency.
    torch.testing.assert_close(frequencies, probabilities, rtol=0, atol=5 * 0.5 / count**0.5)
    assert frequencies[probabilities == 0].sum() == 0


# Part of a block, one block, a block and a token, several blocks.
@pytest.mark.parametrize("vocabulary", [4, 128, 129, 1500])
def test_draw_inverts_the_distribution_function(vocabulary: int) -> None:
    rows = 500
    logits = 3 * torch.randn(rows, vocabulary, generator=generator())
    logits[:, 1::3] = -torch.inf
    uniform = torch.rand(rows, dtype=torch.float64, generator=generator(1))
    drawn = draw(logits, uniform)
    ends = F.softmax(logits, -1).double().cumsum(-1)
    below, upto = ((ends - p)[range(rows), drawn] / ends[:, -1] for p in (F.softmax(logits, -1).double(), 0))
    assert (below - 1e-6 <= uniform).all() and (uniform <= upto + 1e-6).all()  # sums in float32
    assert logits[range(rows), drawn].isfinite().all()


@pytest.mark.parametrize("first", [1, 126, 127, 600])  # inside a block, at its end, across two
def test_draw_never_takes_an_impossible_token_at_the_edges(first: int) -> None:
    logits = torch.full((2, 700), -torch.inf)
    logits[:, first], logits[:, first + 1] = 0.3, 1.7
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, edges).tolist() == [first, first + 1]


def test_sample_refuses_nan(model: Llama) -> None:
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.sample([[]], max_length=4)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        ([[], [5] * 9], {"max_length": 10}, r"prompt 1 .* got 9 tokens"),
        ([[400]], {}, r"ids in \[0, 400\), got 1..400"),
        ([[-1]], {}, r"got -1"),
        ([[]], {"max_length": 49}, r"max_length must be in \[2, 48\], got 49"),
        ([[]], {"max_length": 1}, "max_length"),
        ([[]], {"temperature": -1.0}, "temperature must be positive, got -1.0"),
    ],
)
def test_sample_errors(model: Llama, prompts: list[list[int]], options: dict, message: str) -> None:
    assert model.vocab_size == 400
    with pytest.raises(ValueError, match=message):
        model.sample(prompts, **({"max_length": 10} | options))


def test_forward_refuses_longer_sequences(model: Llama) -> None:
    with pytest.raises(ValueError, match=r"T <= 48, got \[1, 49\]"):
        model(torch.ones(1, 49, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be a positive integer, got 0"),
        ({"dim": 36, "heads": 4}, "multiple of 2 \\* heads = 8, got 36"),
        ({"pad_id": 50}, r"pad_id must be in \[0, 50\), got 50"),
    ],
)
def test_config_errors(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**({"vocab_size": 50} | change))


def test_save_and_load_keep_every_bit(model: Llama, tmp_path: Path) -> None:
    model.save(tmp_path / "new" / "folder")
    loaded = load_model(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_half_precision_weights_load_as_float32(model: Llama, tmp_path: Path) -> None:
    model.bfloat16().save(tmp_path)
    loaded = load_model(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.embedding.weight, model.embedding.weight.float())


def test_full_disk_leaves_the_old_model(
    make_model: Callable[..., Llama], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_model(0)
    old.save(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"{CONFIG_FILE}.*No space left"):
        make_model(1).save(tmp_path)
    assert torch.equal(load_model(tmp_path).embedding.weight, old.embedding.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_load_names_the_broken_file(model: Llama, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE):
        load_model(tmp_path)
    model.save(tmp_path)
    weights = (tmp_path / WEIGHTS_FILE).read_bytes()
    for cut in (0, 4, 100, len(weights) - 1):
        (tmp_path / WEIGHTS_FILE).write_bytes(weights[:cut])
        with pytest.raises(ValueError, match=rf"{WEIGHTS_FILE} is truncated"):
            load_model(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS_FILE):
        load_model(tmp_path)
    for content in ("{", "[]", '{"vocab_size": 400, "colour": 1}', '{"dim": 32}', '{"vocab_size": -1}'):
        (tmp_path / CONFIG_FILE).write_text(content)
        with pytest.raises(ValueError, match=CONFIG_FILE):
            load_model(tmp_path)


def test_load_refuses_weights_of_another_shape(model: Llama, tmp_path: Path) -> None:
    model.save(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"ffn_dim": 64}))
    with pytest.raises(
        ValueError, match=rf"{WEIGHTS_FILE} does not match .*ffn.down.weight.*\(32, 64\), got \(32, 48\)"
    ):
        load_model(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    weights = load_file(tmp_path / WEIGHTS_FILE)
    del weights["norm.weight"]
    save_file(weights, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"1 tensors differ, first norm.weight.*got none"):
        load_model(tmp_path)


def test_load_pretrained_refuses_another_tokenizer(
    model: Llama, tokenizer: Tokenizer, story_texts: list[str], tmp_path: Path
) -> None:
    model.save(tmp_path)
    tokenizer.save(tmp_path / TOKENIZER_FILE)
    assert load_pretrained(tmp_path)[1].encode("Once") == tokenizer.encode("Once")
    Tokenizer.train(story_texts, vocab_size=401).save(tmp_path / TOKENIZER_FILE)
    with pytest.raises(ValueError, match=rf"{TOKENIZER_FILE} has 401 ids and does not fit .*{CONFIG_FILE}.* 400"):
        load_pretrained(tmp_path)
