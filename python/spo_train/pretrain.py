"""Pretraining of a small Llama on plain text, or on the story grammar: how the shipped reference model was made."""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spo_kernels import sequence_logps, token_logps
from spo_train.checkpoint import load_checkpoint, save_checkpoint
from spo_train.errors import NonFiniteLossError
from spo_train.files import write_atomically
from spo_train.metrics import JsonlLog
from spo_train.models.llama import TOKENIZER_FILE, WEIGHTS_FILE, Llama, ModelConfig, save_model
from spo_train.protocol import IGNORE_INDEX, Sequences
from spo_train.source_config import PretrainConfig
from spo_train.tokenizer import Tokenizer
from spo_train.toy.grammar import stories

CHECKPOINT_FILE, METRICS_FILE, RECIPE_FILE = "checkpoint.safetensors", "metrics.jsonl", "recipe.json"
REFERENCE_STORIES, STORIES_SEED = 60_512, 1  # 60,000 to train on and 512 held out


@dataclass(frozen=True)
class PretrainResult:
    """What a run made: also written to its folder, which `spo_train.models.llama.load_pretrained` reads.

    Attributes:
        nll_per_token, nll_per_sequence: held-out negative log-likelihood in nats, eos counted.
        train_sequences, held_out_sequences: how many there were.
    """

    model: Llama
    tokenizer: Tokenizer
    nll_per_token: float
    nll_per_sequence: float
    train_sequences: int
    held_out_sequences: int


@dataclass(frozen=True)
class Corpus:
    """Documents of plain text, and the files that could not be used, each with the reason."""

    documents: list[str]
    skipped: list[str] = field(default_factory=list)


def read_corpus(paths: Sequence[str | os.PathLike[str]], *, per_line: bool = False) -> Corpus:
    """Reads UTF-8 text files, and the `.txt` files of folders and their subfolders in the order of their names.

    Args:
        paths: files and folders.
        per_line: whether each line is a document, instead of each file.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: there is no usable text in all of them.
    """
    documents: list[str] = []
    skipped: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        for file in sorted(path.rglob("*.txt")) if path.is_dir() else [path]:
            try:
                text = file.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                skipped.append(f"{file}: not UTF-8 at byte {error.start}")
                continue
            except OSError as error:
                skipped.append(f"{file}: {error.strerror}")
                continue
            found = [part.strip() for part in (text.splitlines() if per_line else [text])]
            found = [part for part in found if part]
            if not found:
                skipped.append(f"{file}: empty")
            documents += found
    if not documents:
        where = ", ".join(map(str, paths))
        reasons = "; ".join(skipped) if skipped else "no .txt files"
        raise ValueError(f"no usable text in {where} ({reasons})")
    return Corpus(documents, skipped)


def pretrain(
    documents: Sequence[str],
    out_dir: str | os.PathLike[str],
    config: PretrainConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    device: str | torch.device = "cpu",
    resume: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> PretrainResult:
    """Trains a tokenizer (unless one is given) and a model on documents, and writes both into a folder.

    An interrupted run goes on from its last checkpoint when it is called again with the same arguments, and ends with
    the weights it would have had. The same arguments and number of threads give the same weights.

    Args:
        documents: plain text; each becomes `bos text eos`, split where longer than `config.max_length`.
        out_dir: receives config.json, model.safetensors, tokenizer.model, metrics.jsonl and, meanwhile, a checkpoint.
        config: sizes and schedule; None takes the defaults.
        tokenizer: reused instead of training one.
        device: where to train.
        resume: whether to go on from a checkpoint in `out_dir`; False starts over.
        overwrite: whether a finished model in `out_dir` may be replaced.
        progress: whether to show progress bars, when standard error is a terminal.

    Raises:
        ValueError: no or too little text, a finished model in `out_dir`, or a checkpoint of another run.
        NonFiniteLossError: the loss or its gradient is NaN or infinite; the last checkpoint stands.
    """
    config = config or PretrainConfig()
    folder = Path(out_dir)
    checkpoint = folder / CHECKPOINT_FILE
    if not overwrite and not checkpoint.exists() and (folder / WEIGHTS_FILE).exists():
        raise ValueError(f"{folder} already holds a model: choose another folder, or allow it to be overwritten")
    if tokenizer is None:
        # Training it is deterministic: a resumed run gets the same one.
        tokenizer = Tokenizer.train(documents, vocab_size=config.vocab_size)
    data = TokenSequences.encode(documents, tokenizer, config.max_length, progress=progress)
    train, held_out = data.split(config.held_out, config.seed)

    torch.manual_seed(config.seed)
    model = Llama(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            dim=config.dim,
            layers=config.layers,
            heads=config.heads,
            ffn_dim=config.ffn_dim,
            max_length=config.max_length,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True
    )
    run = {
        "config": json.loads(json.dumps(asdict(config))),
        "data": f"{len(data)} sequences, crc {data.checksum():08x}",
    }
    done = 0
    if resume and checkpoint.exists():
        done = _restore(checkpoint, run, model, optimizer)
    metrics = JsonlLog(folder / METRICS_FILE, keep_to_step=done or None)
    order = train.by_length(config.seed)
    nll_per_token = nll_per_sequence = math.nan
    trained_tokens, began = 0, time.perf_counter()
    bar = tqdm(
        total=config.steps,
        initial=done,
        desc="pretrain",
        unit="step",
        disable=None if progress else True,
        smoothing=0.1,
    )
    with bar:
        for step in range(done, config.steps):
            lr = _learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = train.batch(_draw_batch(order, step, config), tokenizer.pad_id, device)
            loss = nll_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            if not math.isfinite(loss.item() + grad_norm.item()):
                raise NonFiniteLossError(
                    f"step {step + 1}: loss is {loss.item()}, gradient norm is {grad_norm.item()}; stopped before the "
                    "update (try a smaller lr)"
                )
            optimizer.step()
            trained_tokens += int((batch.lengths - 1).sum())
            row = {
                "step": step + 1,
                "loss": loss.item(),
                "lr": lr,
                "grad_norm": grad_norm.item(),
                "tokens_per_second": round(trained_tokens / (time.perf_counter() - began)),
            }
            if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                nll_per_token, nll_per_sequence = held_out_nll(model, held_out, tokenizer.pad_id)
                row |= {"nll_per_token": nll_per_token, "nll_per_sequence": nll_per_sequence}
            metrics.write(row)
            bar.set_postfix(loss=f"{row['loss']:.3f}", tokens_per_s=row["tokens_per_second"], refresh=False)
            bar.update()
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                _save(checkpoint, run, step + 1, model, optimizer)
    tokenizer.save(folder / TOKENIZER_FILE)
    save_model(model, folder)
    checkpoint.unlink(missing_ok=True)
    return PretrainResult(model.eval(), tokenizer, nll_per_token, nll_per_sequence, len(train), len(held_out))


def train_reference(
    out_dir: str | os.PathLike[str],
    config: PretrainConfig | None = None,
    *,
    story_count: int = REFERENCE_STORIES,
    resume: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> PretrainResult:
    """Makes a reference model from the story grammar; the defaults remake the one shipped in `spo_train/toy/assets`.

    Besides what `pretrain` writes, `recipe.json` in `out_dir` tells how the model was made and its measured NLL. The
    package ships config.json, model.safetensors, tokenizer.model and recipe.json.
    """
    config = config or PretrainConfig()
    folder = Path(out_dir)
    result = pretrain(
        stories(story_count, seed=STORIES_SEED),
        folder,
        config,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
    recipe = {
        "made_by": "spo_train.pretrain.train_reference",
        "stories": {"grammar": "spo_train.toy.grammar", "count": story_count, "seed": STORIES_SEED},
        "tokenizer": {"kind": "sentencepiece BPE", "vocab_size": result.tokenizer.vocab_size},
        "pretrain": asdict(config),
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "train_stories": result.train_sequences,
        "held_out_stories": result.held_out_sequences,
        "held_out_nll_per_token": round(result.nll_per_token, 4),
        "held_out_nll_per_story": round(result.nll_per_sequence, 2),
    }
    write_atomically(folder / RECIPE_FILE, (json.dumps(recipe, indent=2) + "\n").encode())
    return result


def nll_loss(model: Llama, batch: Sequences) -> Tensor:
    """Mean negative log-likelihood, in nats a token, of a batch's labels."""
    labels = batch.labels()
    logps = token_logps(model(batch.tokens[:, :-1]), labels, inplace_backward=True)
    return -logps.sum() / (labels != IGNORE_INDEX).sum()


@torch.no_grad()
def held_out_nll(model: Llama, data: TokenSequences, pad_id: int, batch_size: int = 64) -> tuple[float, float]:
    """Negative log-likelihood of all sequences of `data`, in nats a token and in nats a sequence."""
    device = next(model.parameters()).device
    order = np.argsort(data.lengths, kind="stable")
    was_training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(order), batch_size):
        batch = data.batch(order[start : start + batch_size], pad_id, device)
        total -= sequence_logps(model(batch.tokens[:, :-1]), batch.labels()).double().sum().item()
    model.train(was_training)
    return total / int((data.lengths - 1).sum()), total / len(data)


@dataclass(frozen=True)
class TokenSequences:
    """Sequences of at least 2 and at most `max_length` tokens, as windows of one flat array.

    Attributes:
        flat: [tokens] int32, all documents one after the other, each `bos ids eos`.
        starts, lengths: [S] int64, where each sequence lies in `flat`.
    """

    flat: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @classmethod
    def encode(
        cls,
        documents: Sequence[str],
        tokenizer: Tokenizer,
        max_length: int,
        *,
        progress: bool = False,
        chunk: int = 1000,
    ) -> TokenSequences:
        if len(documents) == 0:
            raise ValueError("documents must hold at least one text, got none")
        parts, starts, lengths, offset = [], [], [], 0
        with tqdm(total=len(documents), desc="tokenize", unit="doc", disable=None if progress else True) as bar:
            for first in range(0, len(documents), chunk):
                encoded = tokenizer.encode(list(documents[first : first + chunk]))
                for ids in encoded:
                    parts.append(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype=np.int32))
                    # Windows overlap by one token, so that every token but bos is a target exactly once.
                    for start in range(0, len(parts[-1]) - 1, max_length - 1):
                        starts.append(offset + start)
                        lengths.append(min(max_length, len(parts[-1]) - start))
                    offset += len(parts[-1])
                bar.update(len(encoded))
        return cls(np.concatenate(parts), np.array(starts), np.array(lengths))

    def split(self, held_out: int, seed: int) -> tuple[TokenSequences, TokenSequences]:
        """Training sequences, and `held_out` random ones (at most a tenth) kept from training."""
        count = min(held_out, len(self) // 10)
        if count == 0:
            raise ValueError(f"too little text: it makes {len(self)} sequences, and at least 10 are needed")
        order = np.random.default_rng((seed, 0)).permutation(len(self))
        kept, held = np.sort(order[count:]), np.sort(order[:count])
        return (
            TokenSequences(self.flat, self.starts[kept], self.lengths[kept]),
            TokenSequences(self.flat, self.starts[held], self.lengths[held]),
        )

    def by_length(self, seed: int, jitter: float = 6.0) -> np.ndarray:
        """An order in which neighbours have similar lengths: batches need little padding.

        The jitter, in tokens, mixes neighbours that the sort would keep together for ever.
        """
        noise = np.random.default_rng((seed, 1)).normal(0.0, jitter, len(self))
        return np.argsort(self.lengths + noise, kind="stable")

    def batch(self, indices: np.ndarray, pad_id: int, device: str | torch.device) -> Sequences:
        lengths = self.lengths[indices]
        columns = np.arange(lengths.max())
        inside = columns < lengths[:, None]
        tokens = np.where(inside, self.flat[np.where(inside, self.starts[indices, None] + columns, 0)], pad_id)
        return Sequences(
            torch.from_numpy(tokens.astype(np.int64)).to(device),
            torch.ones(len(indices), dtype=torch.int64, device=device),
            torch.from_numpy(lengths.astype(np.int64)).to(device),
        )

    def checksum(self) -> int:
        return zlib.crc32(self.starts.tobytes(), zlib.crc32(self.flat.tobytes()))


def _learning_rate(step: int, config: PretrainConfig) -> float:
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * warmup * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


def _draw_batch(order: np.ndarray, step: int, config: PretrainConfig) -> np.ndarray:
    """A random run of neighbours in `order`; depends on seed and step alone, so that a checkpoint needs no more."""
    size = min(config.batch_size, len(order))
    start = np.random.default_rng((config.seed, 2, step)).integers(len(order) - size + 1)
    return order[start : start + size]


def _save(path: Path, run: dict[str, Any], step: int, model: Llama, optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in moments.items()}
    save_checkpoint(path, tensors=tensors, state={"run": run, "step": step})


def _restore(path: Path, run: dict[str, Any], model: Llama, optimizer: torch.optim.Optimizer) -> int:
    """Loads model and optimizer, and returns the number of steps done."""
    tensors, state = load_checkpoint(path)
    saved = state.get("run", {})
    if saved != run:
        ours, theirs = {**run["config"], "data": run["data"]}, {**saved.get("config", {}), "data": saved.get("data")}
        differing = [f"{key} was {theirs.get(key)!r}, is {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]
        raise ValueError(
            f"{path} belongs to another run ({'; '.join(differing)}): start over, or choose another folder"
        )
    model.load_state_dict({key.removeprefix("model/"): t for key, t in tensors.items() if key.startswith("model/")})
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            moments.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return state["step"]
