"""Models of transformers in the trainer: heads, samples, a whole run with resume, and the folder that it writes."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

pytest.importorskip("transformers", reason='needs transformers: pip install "spo_kernels[hf]"')

import huggingface_hub
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from spo_train.align import Aligner
from spo_train.commands import cli
from spo_train.config import AlignConfig, EvaluateConfig
from spo_train.evaluate import Evaluator
from spo_train.heads import response_logps
from spo_train.models.huggingface import HuggingFaceModel, HuggingFaceTokenizer, load_pretrained
from spo_train.pair_data import load_pairs
from spo_train.protocol import IGNORE_INDEX, Sequences

NAMES = ["llama", "qwen2", "gemma2"]
ALIGN = {"steps": 4, "batch_size": 4, "kl_samples": 4, "kl_every": 3, "warmup_steps": 1, "lr": 1e-3}
EVALUATE = ["--evaluate-samples", "4", "--evaluate-reference-samples", "4", "--evaluate-every", "2"]


def spo_train(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object, code: int = 2) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert len(result.output.strip().splitlines()) <= 2, result.output
    return result.output.rsplit("Error: ", 1)[1]


def options(**settings: Any) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def changed(folder: Path) -> HuggingFaceModel:
    """The model of a folder with other weights, as a reference."""
    model, _ = load_pretrained(str(folder))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def logits(model: HuggingFaceModel, tokens: torch.Tensor) -> torch.Tensor:
    """As transformers computes them, without columns that no token has."""
    return model.model(tokens).logits[..., : model.vocab_size]


def objective(aligner: Aligner) -> torch.Tensor:
    """SPO of the first step in plain torch."""
    config, batch = aligner.config, aligner.pairs.batch(aligner._order.indices(0))
    labels = batch.labels()
    log_probs = F.log_softmax(logits(aligner.policy, batch.tokens[:, :-1]), -1)
    picked = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    chosen, rejected = torch.where(labels == IGNORE_INDEX, 0, picked).sum(1).chunk(2)
    samples: Sequences = aligner._kl_batch.samples
    p, q = (F.log_softmax(logits(model, samples.tokens[:, :-1]), -1) for model in (aligner.policy, aligner.reference))
    kl = torch.where(samples.labels() == IGNORE_INDEX, 0, (p.exp() * (p - q)).sum(-1)).sum(1).mean()
    preference = -F.logsigmoid(config.alpha * (chosen - rejected)) / config.alpha
    return preference.mean() + config.effective_beta * kl


@pytest.mark.parametrize("name", NAMES)
def test_a_step_has_the_gradient_of_the_plain_formula_and_stores_no_logits(
    name: str, folders: dict[str, Path], chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, tokenizer = load_pretrained(str(folders[name]))
    reference = changed(folders[name])
    pairs, _ = load_pairs(chat_file, tokenizer, max_length=policy.max_length)
    config = AlignConfig(**ALIGN, alpha=0.3, beta=0.5, weight="uniform", clip=1e9)
    aligner = Aligner(policy.double(), reference.double(), pairs, config)
    assert aligner._kl.from_heads
    monkeypatch.setattr(aligner._optimizer, "step", lambda: None)
    with monkeypatch.context() as patched:
        patched.setattr(HuggingFaceModel, "forward", lambda *_: pytest.fail("the logits were computed"))
        record = aligner.update()
    expected = objective(aligner)
    assert record["loss"] == pytest.approx(expected.item(), rel=1e-9)
    parameters = list(policy.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["spo", "dpo"])
def test_logits_give_the_losses_of_heads(
    name: str, method: str, folders: dict[str, Path], chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for from_heads in (True, False):
        if not from_heads:
            monkeypatch.setattr(HuggingFaceModel, "head", lambda _: None)
        policy, tokenizer = load_pretrained(str(folders[name]))
        pairs, _ = load_pairs(chat_file, tokenizer, max_length=policy.max_length)
        aligner = Aligner(policy, changed(folders[name]), pairs, AlignConfig(**ALIGN, method=method))
        assert aligner._kl.from_heads == from_heads
        losses.append([aligner.update()["loss"] for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_unknown_transform_of_the_logits_means_no_head(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "capped")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logit_cap": 3.0}))
    with pytest.warns(UserWarning, match="its logits are stored, .* because config has logit_cap = 3.0"):
        model, _ = load_pretrained(str(folder))
    assert model.head() is None

    plain = LlamaConfig.from_pretrained(folders["llama"])
    inner = AutoModelForCausalLM.from_config(plain)
    forward = inner.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(inner, "forward", scaled)
    with pytest.warns(UserWarning, match="because the head gives other logits than the model; they differ by 9.9e-03"):
        model = HuggingFaceModel(inner, vocab_size=300, max_length=32, end_ids=[1], pad_id=0)
    assert model.head() is None


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_those_of_full_passes(name: str, folders: dict[str, Path]) -> None:
    model, tokenizer = load_pretrained(str(folders[name]))
    prompts = [[5], [7, 20, 30, 41], [9, 10]]
    model.train()
    samples = model.sample(prompts, max_length=24, temperature=1e-4, generator=generator())
    assert model.training
    assert samples.prompt_lens.tolist() == [1, 4, 2]
    for tokens, prompt, length in zip(samples.tokens, prompts, samples.lengths.tolist(), strict=True):
        assert tokens[: len(prompt)].tolist() == prompt
        with torch.no_grad():
            expected = logits(model.eval(), tokens[None, : length - 1])[0].argmax(-1)
        assert tokens[len(prompt) : length].tolist() == expected[len(prompt) - 1 :].tolist()
        response = tokens[len(prompt) : length].tolist()
        assert not tokenizer.end_ids & set(response[:-1])
        assert length == 24 or response[-1] in tokenizer.end_ids
        assert set(tokens[length:].tolist()) <= {tokenizer.pad_id}


def test_rows_of_a_draw_are_those_of_the_whole(folders: dict[str, Path]) -> None:
    model, _ = load_pretrained(str(folders["qwen2"]))
    prompts = [[5], [7, 20, 30, 41], [9, 10], [11]]
    whole = model.sample(prompts, max_length=24, generator=generator())
    part = model.sample(prompts, max_length=24, generator=generator(), rows=slice(1, 3))
    assert part.prompt_lens.tolist() == whole.prompt_lens[1:3].tolist()
    assert part.lengths.tolist() == whole.lengths[1:3].tolist()
    assert torch.equal(part.tokens, whole.tokens[1:3, : part.tokens.shape[1]])


def test_the_generation_settings_of_a_model_are_not_used(folders: dict[str, Path]) -> None:
    model, _ = load_pretrained(str(folders["qwen2"]))
    settings = model.model.generation_config
    assert (settings.repetition_penalty, settings.top_k) == (5.0, 1)
    settings.update(min_new_tokens=30, suppress_tokens=[50, 60], forced_eos_token_id=7, num_return_sequences=2)
    samples = [model.sample([[40, 41, 40, 41]] * 30, max_length=40, generator=generator()) for _ in range(2)]
    model.model.generation_config = transformers.GenerationConfig()
    samples.append(model.sample([[40, 41, 40, 41]] * 30, max_length=40, generator=generator()))
    assert all(torch.equal(drawn.tokens, samples[0].tokens) for drawn in samples)
    assert samples[0].lengths.min() < 34


def test_samples_follow_the_distribution_and_the_generator_alone(folders: dict[str, Path]) -> None:
    model, tokenizer = load_pretrained(str(folders["qwen2"]))
    count, state = 4000, torch.get_rng_state()
    drawn = model.sample([[40, 41]] * count, max_length=3, generator=generator()).tokens[:, 2]
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        p = logits(model, torch.tensor([[40, 41]]))[0, -1].double().softmax(-1)
    counts = torch.bincount(drawn, minlength=len(p)).double()
    assert len(counts) == len(p) == len(tokenizer.tokenizer) < model.model.config.vocab_size
    often = p * count > 5
    chi2 = ((counts - p * count) ** 2 / (p * count))[often].sum()
    freedom = int(often.sum()) - 1
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5

    first = model.sample([[5], [6, 7]], max_length=20, generator=generator(3))
    assert torch.equal(model.sample([[5], [6, 7]], max_length=20, generator=generator(3)).tokens, first.tokens)
    assert not torch.equal(model.sample([[5], [6, 7]], max_length=20, generator=generator(4)).tokens, first.tokens)


KINDS: dict[str, dict[str, Any]] = {
    "CohereConfig": {"logit_scale": 0.3},
    "GraniteConfig": {"logits_scaling": 3.0},
    "MixtralConfig": {"num_local_experts": 4, "num_key_value_heads": 2, "intermediate_size": 48},
    "MambaConfig": {},
    "OPTConfig": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    "BartConfig": {
        "d_model": 32,
        "decoder_layers": 1,
        "decoder_ffn_dim": 32,
        "decoder_attention_heads": 4,
        "init_std": 0.3,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures(kind: str) -> None:
    """A logit scale and its inverse, experts, a state space, two tables of positions, one of which counts padding."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
    config = getattr(transformers, kind)(vocab_size=100, max_position_embeddings=64, **shape | KINDS[kind])
    model = HuggingFaceModel(
        AutoModelForCausalLM.from_config(config), vocab_size=98, max_length=40, end_ids=[1], pad_id=0
    )
    head, tokens = model.head(), torch.arange(90).view(3, 30)
    assert head is not None
    with torch.no_grad():
        expected = F.log_softmax(logits(model, tokens[:, :-1]), -1).gather(-1, tokens[:, 1:, None]).sum((1, 2))
        torch.testing.assert_close(response_logps(model, tokens[:, :-1], tokens[:, 1:]), expected, rtol=1e-4, atol=1e-3)
        samples = model.sample([[5], [7, 20, 30], [9, 10]], max_length=20, temperature=1e-4, generator=generator())
        for row, start, end in zip(samples.tokens, samples.prompt_lens, samples.lengths, strict=True):
            best = logits(model, row[None, : end - 1])[0].argmax(-1)
            assert torch.equal(row[start:end], best[start - 1 :])


def test_a_table_of_positions_is_not_exceeded() -> None:
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    inner = AutoModelForCausalLM.from_config(config)
    model = HuggingFaceModel(inner, vocab_size=50, max_length=16, end_ids=[0], pad_id=0)
    assert model.head() is not None
    samples = model.sample([[3] * 12, [4], [5] * 12], max_length=16, generator=generator())
    assert samples.tokens.shape == (3, int(samples.lengths.max()))
    assert samples.prompt_lens.tolist() == [12, 1, 12]
    assert samples.lengths.max() <= 16
    assert samples.tokens[2, :12].tolist() == [5] * 12


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "at least one prompt, got none"),
        ([[]], {}, "prompt 0 must have a token at least"),
        ([[1] * 16], {}, "leave room for a response within max_length=16, got 16 tokens"),
        ([[999]], {}, "prompts must hold ids in"),
        ([[1]], {"max_length": 65}, r"max_length must be in \[2, 64\], got 65"),
        ([[1]], {"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_bad_prompts_are_refused(
    folders: dict[str, Path], prompts: list[list[int]], settings: dict[str, Any], message: str
) -> None:
    model, _ = load_pretrained(str(folders["llama"]))
    with pytest.raises(ValueError, match=message):
        model.sample(prompts, **{"max_length": 16} | settings)


@pytest.mark.parametrize("name", NAMES)
def test_the_kl_of_an_evaluation_is_exact(name: str, folders: dict[str, Path]) -> None:
    policy, tokenizer = load_pretrained(str(folders[name]), strings="text")
    reference = changed(folders[name])
    config = EvaluateConfig(samples=4, reference_samples=2)
    evaluator = Evaluator(
        reference, tokenizer, config, judge=lambda text, _: {"score": len(text)}, prompts=["the dog", "tell me a"]
    )
    _, (batch,) = evaluator._sample(policy, 4, seed=7)
    with torch.no_grad():
        p, q = (F.log_softmax(logits(model.eval(), batch.tokens[:, :-1]).double(), -1) for model in (policy, reference))
    expected = torch.where(batch.labels() == IGNORE_INDEX, 0, (p.exp() * (p - q)).sum(-1)).sum(1)
    torch.testing.assert_close(torch.from_numpy(evaluator._kl(policy, [batch])), expected, rtol=1e-4, atol=1e-5)
    same = Evaluator(policy, tokenizer, config, judge=lambda text, _: {"score": 1.0}, prompts=["the dog"])
    assert same.evaluate(policy).metrics["kl"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_life(name: str, folders: dict[str, Path], chat_file: Path, tmp_path: Path) -> None:
    model, run = folders[name], tmp_path / "run"
    align = ["align", "--pairs", chat_file, "--model", model, "--max-length", "40", *options(**ALIGN)]
    judged = [*align, "--judge", "builtins:len", *EVALUATE]
    said = spo_train(*judged, "--out", run)
    assert "24 pairs, lines left out: 0" in said
    assert ("by the chat template" in said) == (name != "llama")
    about = json.loads((run / "run.json").read_text())
    assert about["finished"]
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [record["step"] for record in evaluations] == [0, 2, 4]
    assert evaluations[0]["kl"] == 0 < evaluations[-1]["kl"]

    # Stopped after two steps and resumed, a run has the same losses and writes the same weights.
    broken = tmp_path / "broken"
    spo_train(*judged, "--out", broken, "--steps", "2")
    assert "max_length was 40, is 41" in refused(*judged, "--out", broken, "--resume", "--max-length", "41")
    spo_train(*judged, "--out", broken, "--resume")
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, broken)
    ]
    assert losses[0] == losses[1]
    weights = (run / "model" / "model.safetensors").read_bytes()
    assert weights == (broken / "model" / "model.safetensors").read_bytes()
    assert weights != (model / "model.safetensors").read_bytes()

    # What was written is a model of transformers like the one before.
    aligned, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (run / "model", model))
    assert type(aligned) is type(before)
    assert aligned.config.tie_word_embeddings == before.config.tie_word_embeddings
    assert aligned.generation_config.to_dict() == before.generation_config.to_dict()
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (run / "model", model)]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the dog\ntell me\n")
    evaluate = ["evaluate", run, "--reference", model, "--judge", "builtins:len", "--prompts", prompts]
    result = json.loads(
        spo_train(*evaluate, "--strings", "text", "--max-length", "32", "--samples", "4", "--reference-samples", "4")
    )
    assert result["kl"] > 0
    before_text = json.loads((run / "stories.jsonl").read_text().splitlines()[0])["before"]["text"]
    start = "<|im_start|>user\n" if name == "qwen2" else "<start_of_turn>user\n" if name == "gemma2" else "user: "
    assert before_text.startswith(start)
    # The aligned model can be aligned again.
    spo_train("align", "--pairs", chat_file, "--model", run, "--out", tmp_path / "again", *options(**ALIGN))


@pytest.mark.parametrize("strings", ["text", "chat"])
def test_pairs_of_samples_are_in_the_words_of_the_prompts(
    strings: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("the dog\ntell me\n")
    sizes = ["--pairs", "16", "--max-length", "32", "--noise", "6", "--prompts", tmp_path / "prompts.txt"]
    made = tmp_path / "made.jsonl"
    spo_train("pairs", "--model", folders["qwen2"], "--out", made, *sizes, "--strings", strings)
    rows = [json.loads(line) for line in made.read_text().splitlines()]
    assert {row["prompt"] for row in rows} == {"the dog", "tell me"}
    said = spo_train(
        *("align", "--pairs", made, "--model", folders["qwen2"], "--out", tmp_path / "run", "--strings", strings),
        *options(**ALIGN, max_length=40),
    )
    assert f"{len(rows)} pairs" in said


def edited(source: Path, target: Path, edit: Callable[[Path], None]) -> Path:
    shutil.copytree(source, target)
    edit(target)
    return target


def without_a_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    layers = {"num_hidden_layers": 3} | ({"layer_types": None} if "layer_types" in config else {})
    (folder / "config.json").write_text(json.dumps(config | layers))


def quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )


def more_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<more{i}>" for i in range(20)])
    tokenizer.save_pretrained(folder)


def only_an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_a_layer, "lacks 9 weights of LlamaForCausalLM, first model.layers.2"),
        (quantized, "the weights are quantized"),
        (more_tokens, "and the model has logits for 3"),
        (only_an_adapter, "is an adapter without its model: merge it"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "cannot be loaded by transformers: "),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded by transformers: "),
        (lambda folder: (folder / "tokenizer.json").unlink(), "/model cannot be loaded by transformers: "),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "new"}'),
            "cannot be loaded by transformers",
        ),
    ],
)
def test_models_that_cannot_be_trained_are_refused(
    edit: Callable[[Path], None], message: str, folders: dict[str, Path], chat_file: Path, tmp_path: Path
) -> None:
    folder = edited(folders["llama"], tmp_path / "model", edit)
    assert message in refused("align", "--pairs", chat_file, "--model", folder, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_encoder_decoder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="must be a decoder, got the encoder-decoder model T5ForConditionalGeneration"):
        HuggingFaceModel(model, vocab_size=400, max_length=16, end_ids=[1], pad_id=0)
    folder = edited(folders["llama"], tmp_path / "model", lambda folder: model.save_pretrained(folder))
    with pytest.raises(ValueError, match="cannot be loaded by transformers: .*T5"):
        load_pretrained(str(folder))


def test_other_mistakes_are_one_line(
    folders: dict[str, Path], chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    align = ["align", "--pairs", chat_file, "--out", tmp_path / "run", *options(**ALIGN)]
    assert "max_length must be in [2, 64]" in refused(*align, "--model", folders["llama"], "--max-length", "65")
    assert "must have the same tokenizer" in refused(
        *align, "--model", folders["llama"], "--reference", folders["qwen2"]
    )
    assert "has no chat template, got chat" in refused(*align, "--model", folders["llama"], "--strings", "chat")
    assert "pass --reference" in refused("evaluate", folders["llama"])
    assert "pass --reference" in refused("evaluate", folders["llama"], "--max-length", "64")
    assert "does not exist" in refused(*align, "--model", tmp_path / "none")
    assert "nobody/nothing cannot be loaded by transformers" in refused(*align, "--model", "nobody/nothing")


def test_a_tokenizer_without_eos_is_refused(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have an eos token, got none"):
        HuggingFaceTokenizer(tokenizer)


def test_dropout_is_off(chat_file: Path, folders: dict[str, Path]) -> None:
    _, tokenizer = load_pretrained(str(folders["llama"]))
    shape = {"n_positions": 48, "n_embd": 16, "n_layer": 1, "n_head": 2, "attn_pdrop": 0.5, "resid_pdrop": 0.5}
    inner = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=tokenizer.vocab_size, **shape, embd_pdrop=0.5))
    model = HuggingFaceModel(inner, vocab_size=tokenizer.vocab_size, max_length=48, end_ids=[1], pad_id=0)
    pairs, _ = load_pairs(chat_file, tokenizer, max_length=48)
    record = Aligner(model, copy.deepcopy(model), pairs, AlignConfig(**ALIGN)).update()
    assert model.training
    assert record["kl"] == 0


def test_nothing_imports_transformers_before_a_model_needs_it(tmp_path: Path) -> None:
    modules = ["commands", "alignment", "evaluate", "pair_files", "models.loading", "toy.demo"]
    code = f"import sys, {', '.join(f'spo_train.{module}' for module in modules)}\n"
    code += "heavy = {'transformers', 'datasets', 'pyarrow'} & set(sys.modules)\nassert not heavy, heavy"
    # Outside the source tree: Python would import it from the current directory, before the installed package.
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_name_of_the_hub_is_read_from_its_cache(folders: dict[str, Path], chat_file: Path, tmp_path: Path) -> None:
    """In a process of its own, with a cache as a download leaves it, and without a network."""
    cached = tmp_path / "hub" / "models--tiny--qwen2"
    shutil.copytree(folders["qwen2"], cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    command = [sys.executable, "-m", "spo_train", "align", "--pairs", chat_file, "--model", "tiny/qwen2"]
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, "--out", "run", *options(**ALIGN)], check=True, cwd=tmp_path, env=environment)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model"] == "tiny/qwen2"
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
