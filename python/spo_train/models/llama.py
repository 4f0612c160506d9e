"""A small Llama: RMSNorm, rotary positions, SwiGLU, tied embeddings, and sampling with a key/value cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spo_train.files import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    StrPath,
    read_json,
    write_atomically,
    write_json,
)
from spo_train.models.draw import draw
from spo_train.protocol import Sequences
from spo_train.tokenizer import BOS_ID, EOS_ID, PAD_ID, Tokenizer

EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a `Llama`. The shipped reference model has the defaults."""

    vocab_size: int
    dim: int = 128
    layers: int = 3
    heads: int = 4
    ffn_dim: int = 352
    max_length: int = 128
    bos_id: int = BOS_ID
    eos_id: int = EOS_ID
    pad_id: int = PAD_ID
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "ffn_dim", "max_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim must be a multiple of 2 * heads = {2 * self.heads}, got {self.dim}")
        for name in ("bos_id", "eos_id", "pad_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name} must be in [0, {self.vocab_size}), got {getattr(self, name)}")


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, cache: Tensor | None) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        (q, k), v = _rotate(qkv[:2], rotation), qkv[2]
        if cache is not None:  # [2, B, heads, positions up to and with these, head_dim]
            cache[0, :, :, -length:], cache[1, :, :, -length:] = k, v
            k, v = cache[0], cache[1]
        # Several tokens come only with an empty cache, where the causal mask is right. A single token attends to the
        # whole cache.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        return self.out(y.transpose(1, 2).reshape(batch, length, dim))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, rotation: Tensor, cache: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, cache)
        return x + self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """A Llama-style causal language model; fulfils `spo_train.protocol.TrainableModel`."""

    rotation: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.max_length = config.vocab_size, config.max_length
        self.bos_id, self.eos_id, self.pad_id = config.bos_id, config.eos_id, config.pad_id
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        head_dim = config.dim // config.heads
        frequency = config.rope_base ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.arange(config.max_length)[:, None] * frequency
        # Cosine and sine of each position: [max_length, head_dim / 2, 2].
        self.register_buffer("rotation", torch.stack((angle.cos(), angle.sin()), -1), persistent=False)
        # Each block adds twice to the residual stream. This scale keeps the variance after all layers near that of one.
        residual_std = EMBEDDING_STD / math.sqrt(2 * config.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                std = residual_std if name.endswith(("out.weight", "down.weight")) else EMBEDDING_STD
                nn.init.normal_(parameter, 0.0, std)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Llama:
        rotation = self.rotation
        super()._apply(fn, recurse)
        if self.rotation.dtype != rotation.dtype:  # in half precision distant positions would get a wrong angle
            self.rotation = rotation.to(self.rotation.device)
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, T, V] of the token after each position of tokens [B, T] int64."""
        if tokens.dim() != 2 or tokens.shape[1] > self.max_length:
            raise ValueError(f"tokens must be [B, T] with T <= {self.max_length}, got {list(tokens.shape)}")
        return self.hidden(tokens) @ self.embedding.weight.T

    def hidden(self, tokens: Tensor, start: int = 0, cache: Tensor | None = None) -> Tensor:
        """Return the final hidden states [B, T, dim] of tokens at positions `start..start+T`; fill the cache there.

        Their products with `embedding.weight` are the logits. The cache is [layers, 2, B, heads, positions, head_dim].
        """
        end = start + tokens.shape[1]
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, self.rotation[start:end], None if cache is None else cache[i, ..., :end, :])
        return self.norm(x)

    def save(self, folder: StrPath) -> None:
        """Write `config.json` and `model.safetensors` into a folder, each replaced atomically."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_json(Path(folder) / CONFIG_FILE, asdict(self.config))
        write_atomically(Path(folder) / WEIGHTS_FILE, safetensors.torch.save(weights))

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_length: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        rows: slice | None = None,
    ) -> Sequences:
        """Draw one continuation per prompt, or per prompt of `rows`; see `LanguageModel.sample`.

        Each row has its own stream of random numbers, drawn before the first step. So the sample for one prompt does
        not depend on the moment at which other rows end.

        Raises:
            ValueError: no prompts, a prompt with no room left for a response, an id out of range, bad `max_length` or
                `temperature`, or logits that are not finite.
        """
        tokens, prompt_lens = self._prompt_rows(prompts, max_length)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        device = self.embedding.weight.device
        noise = torch.rand(
            max_length - int(prompt_lens.min()),
            len(prompts),
            dtype=torch.float64,
            generator=generator,
            device=generator.device if generator is not None else device,
        ).to(device)
        tokens, prompt_lens = tokens.to(device), prompt_lens.to(device)
        if rows is not None:
            tokens, prompt_lens, noise = tokens[rows], prompt_lens[rows], noise[:, rows]
        batch = len(tokens)
        lengths = torch.full_like(prompt_lens, max_length)

        config = self.config
        cache = self.embedding.weight.new_zeros(
            config.layers, 2, batch, config.heads, max_length, config.dim // config.heads
        )
        was_training = self.training
        self.eval()
        try:
            self._continue(tokens, prompt_lens, lengths, cache, noise, temperature)
        finally:
            self.train(was_training)
        return Sequences(tokens[:, : int(lengths.max())].contiguous(), prompt_lens, lengths)

    @torch.inference_mode()
    def _continue(
        self,
        tokens: Tensor,
        prompt_lens: Tensor,
        lengths: Tensor,
        cache: Tensor,
        noise: Tensor,
        temperature: float,
    ) -> None:
        """Write the drawn ids behind each prompt into tokens [B, max_length], and their ends into lengths [B]."""
        device, batch, max_length = tokens.device, *tokens.shape
        # `rows` are the rows of the cache: all running ones, and those that have ended since the last compaction.
        rows, running = torch.arange(batch, device=device), torch.ones(batch, dtype=torch.bool, device=device)
        start, shortest = 0, max_length - noise.shape[0]
        for position in range(shortest, max_length):
            hidden = self.hidden(tokens[rows, start:position], start, cache[:, :, : len(rows)])[:, -1]
            # The other order, hidden @ weight.T, is much slower on a CPU for few rows.
            logits = (self.embedding.weight @ hidden.T).T.contiguous()
            drawn = draw(logits / temperature, noise[position - shortest, rows])
            in_prompt = position < prompt_lens[rows]
            drawn = torch.where(in_prompt, tokens[rows, position], drawn)
            tokens[rows[running], position] = drawn[running]
            ended = running & ~in_prompt & (drawn == self.eos_id)
            lengths[rows[ended]] = position + 1
            running = running & ~ended
            start = position
            alive = int(running.sum())
            if alive == 0:
                break
            # Compacting copies the cache, so it waits until it saves an eighth of a step's work.
            if alive <= len(rows) * 7 // 8:
                kept = running.nonzero().squeeze(1)
                cache[:, :, :alive, :, :position] = cache[:, :, kept, :, :position]
                rows, running = rows[kept], running[kept]

    def _prompt_rows(self, prompts: Sequence[Sequence[int]], max_length: int) -> tuple[Tensor, Tensor]:
        """Return bos and prompts as rows [B, max_length], filled up with the pad id, and their lengths [B]."""
        if len(prompts) == 0:
            raise ValueError("prompts must hold at least one prompt, got none ([[]] samples one text freely)")
        if not 2 <= max_length <= self.max_length:
            raise ValueError(f"max_length must be in [2, {self.max_length}], got {max_length}")
        tokens = torch.full((len(prompts), max_length), self.pad_id)
        tokens[:, 0] = self.bos_id
        for i, prompt in enumerate(prompts):
            if len(prompt) > max_length - 2:
                raise ValueError(
                    f"prompt {i} must leave room for bos and a response within max_length={max_length}, "
                    f"got {len(prompt)} tokens"
                )
            tokens[i, 1 : 1 + len(prompt)] = torch.as_tensor(prompt, dtype=torch.int64)
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(f"prompts must hold ids in [0, {self.vocab_size}), got {tokens.min()}..{tokens.max()}")
        return tokens, torch.tensor([1 + len(prompt) for prompt in prompts])


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring pairs of x [..., T, head_dim] by their positions; rotation is [T, head_dim / 2, 2].

    A complex product is one operation forward and one backward. Cosines and sines of strided halves would be many.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)  # there is no complex bfloat16
    pairs = torch.view_as_complex(x.to(dtype).unflatten(-1, (-1, 2)))
    turned = pairs * torch.view_as_complex(rotation.to(dtype))
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def load_model(path: StrPath, device: str | torch.device = "cpu") -> Llama:
    """Read a folder written by `Llama.save`; the weights become float32, whatever dtype the file has.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: a file is unreadable or truncated, or the weights do not match the config. The message names it.
    """
    config_file, weights_file = Path(path) / CONFIG_FILE, Path(path) / WEIGHTS_FILE
    config = _read_config(config_file)
    if not weights_file.is_file():
        raise FileNotFoundError(f"{weights_file} does not exist")
    try:
        weights = safetensors.torch.load(weights_file.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights_file} is truncated or not a safetensors file: {error}") from error
    model = Llama(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != wanted:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        name = differing[0]
        raise ValueError(
            f"{weights_file} does not match {config_file}: {len(differing)} tensors differ, first {name}, "
            f"which must be {wanted.get(name, 'absent')}, got {found.get(name, 'none')}"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.to(device)


def load_pretrained(path: StrPath, device: str | torch.device = "cpu") -> tuple[Llama, Tokenizer]:
    """Read the model and the tokenizer of a folder that pretraining or an alignment wrote, and check that they fit."""
    model = load_model(path, device)
    tokenizer = Tokenizer.load(Path(path) / TOKENIZER_FILE)
    tokenizer.check_fits(model, str(Path(path) / CONFIG_FILE))
    return model, tokenizer


def _read_config(file: Path) -> ModelConfig:
    values = read_json(file)
    known = {field.name for field in fields(ModelConfig)}
    if not set(values) <= known or "vocab_size" not in values:
        raise ValueError(f"{file} must be an object with vocab_size and fields out of {sorted(known)}, got {values!r}")
    try:
        return ModelConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
