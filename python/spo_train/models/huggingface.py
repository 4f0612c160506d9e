"""Models and tokenizers of Hugging Face transformers. Importing this module needs transformers."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spo_kernels import head_options
from spo_train.chat import human_assistant_messages, prompt_as_lines, reply_as_line
from spo_train.errors import RowError
from spo_train.files import StrPath
from spo_train.models.draw import draw
from spo_train.protocol import Head, LanguageModel, Message, PairIds, Sequences

Strings = Literal["text", "chat"]

# Tokens of a sequence unless the caller asks for more. Long contexts of 128k tokens would make samples that long.
DEFAULT_MAX_LENGTH = 1024
# Stands before a template, which may print the day's date. The tokens are then the same on every day, so that a run can
# be resumed. It ends by printing nothing, because a line break right after a block would be dropped.
FIXED_DATE = "{% macro strftime_now(format) %}01 Jan 2025{% endmacro %}{{ '' }}"
# Largest difference, as a share of the largest logit, between a model's own logits and the product of its hidden states
# with its head.
HEAD_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class HuggingFaceModel(nn.Module):
    """A causal language model of transformers; fulfils `TrainableModel` and `ModelWithHead`.

    The model computes without dropout, in training too, so that a policy equal to its reference has a KL of 0.

    Attributes:
        model: the model.
        vocab_size: ids of the tokenizer. Columns of the logits after them are padding, which the trainer never sees.
        max_length: the most tokens of a sequence.
    """

    def __init__(
        self, model: PreTrainedModel, *, vocab_size: int, max_length: int, end_ids: Sequence[int], pad_id: int
    ) -> None:
        """
        Args:
            model: the model.
            vocab_size: ids of its tokenizer.
            max_length: the most tokens of a sequence, at least 2.
            end_ids: ids after which a sample is finished.
            pad_id: id that fills rows of a batch.

        Raises:
            ValueError: the model is no causal language model with a head of at least `vocab_size` rows.
        """
        super().__init__()
        if model.config.is_encoder_decoder:
            raise ValueError(f"model must be a decoder, got the encoder-decoder model {type(model).__name__}")
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"model must have a language modelling head, got {type(model).__name__}")
        if head.weight.shape[0] < vocab_size:
            raise ValueError(
                f"the tokenizer has {vocab_size} ids, and the model has logits for {head.weight.shape[0]}: resize the "
                "model's embeddings to the tokenizer, or take the tokenizer that belongs to it"
            )
        self.model = model
        self.vocab_size, self.max_length = vocab_size, max_length
        self._end_ids, self._pad_id = sorted(end_ids), pad_id
        self.train(self.training)
        self._head_options = self._checked_head_options()
        self._takes_left_padding = self._check_left_padding()

    def train(self, mode: bool = True) -> HuggingFaceModel:
        """Set the training flag; the layers stay in evaluation mode, without dropout."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, T, V] of the token after each position of tokens [B, T] int64."""
        return self.model(input_ids=tokens, use_cache=False).logits[..., : self.vocab_size]

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the inputs [B, T, H] of the head for tokens [B, T] int64."""
        return self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state

    def head(self) -> Head | None:
        """Return the head; None if the model computes its logits in a way that no option describes."""
        if self._head_options is None:
            return None
        layer = self.model.get_output_embeddings()
        return Head(layer.weight, getattr(layer, "bias", None), **self._head_options)

    def save(self, folder: StrPath) -> None:
        """Write the model into a folder that `from_pretrained` loads. An earlier folder is replaced as a whole."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            with _no_progress_bars():
                self.model.save_pretrained(temporary)
            temporary.chmod(folder.parent.stat().st_mode)  # mkdtemp makes folders private
            if folder.exists():
                shutil.rmtree(folder)
            temporary.replace(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

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

        The model's own generation settings, such as top_k or a repetition penalty, are not used: the samples are those
        of the distribution that the losses see.

        Raises:
            ValueError: no prompts, an empty one, one with no room left for a response, an id out of range, bad
                `max_length` or `temperature`, or logits that are not finite.
        """
        self._check_sampling(prompts, max_length, temperature)
        device = self.model.device
        prompt_lens = torch.tensor([len(prompt) for prompt in prompts])
        uniform = torch.rand(
            max_length - int(prompt_lens.min()),
            len(prompts),
            dtype=torch.float64,
            generator=generator,
            device=generator.device if generator is not None else device,
        ).to(device)
        if rows is not None:
            prompts, prompt_lens, uniform = prompts[rows], prompt_lens[rows], uniform[:, rows]
        tokens = torch.full((len(prompts), max_length), self._pad_id, device=device)
        lengths = torch.empty_like(prompt_lens)
        for group in self._groups(prompt_lens.tolist(), max_length):
            drawn = self._generate([prompts[row] for row in group], max_length, temperature, uniform[:, group])
            for row, ids in zip(group, drawn, strict=True):
                tokens[row, : len(ids)] = ids
                lengths[row] = len(ids)
        return Sequences(tokens[:, : int(lengths.max())].contiguous(), prompt_lens.to(device), lengths.to(device))

    def _generate(
        self, prompts: Sequence[Sequence[int]], max_length: int, temperature: float, uniform: Tensor
    ) -> list[Tensor]:
        """Return each prompt with its continuation, which ends with the first of the end ids or at max_length."""
        longest, shortest = max(map(len, prompts)), min(map(len, prompts))
        draws = _Draw(self.vocab_size, temperature, uniform, longest)
        drawn = self._continued(prompts, max_length - shortest, [draws], eos_token_id=self._end_ids)
        ends = torch.isin(drawn[:, longest:], torch.tensor(self._end_ids, device=drawn.device))
        new = torch.where(ends.any(1), ends.int().argmax(1) + 1, ends.shape[1]).tolist()
        rows = (row[longest - len(prompt) :] for row, prompt in zip(drawn, prompts, strict=True))
        return [
            row[: min(len(prompt) + count, max_length)] for row, prompt, count in zip(rows, prompts, new, strict=True)
        ]

    def _continued(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, processors: Sequence[LogitsProcessor], **settings: Any
    ) -> Any:
        """Return what `generate` returns for prompts padded on the left, taking the likeliest token each time."""
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        device = self.model.device
        with _own_generation_settings_off(self.model):
            return self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=new_tokens, pad_token_id=self._pad_id, **settings
                ),
                logits_processor=LogitsProcessorList(processors),
            )

    def _groups(self, prompt_lens: list[int], max_length: int) -> list[list[int]]:
        """Return the rows that are sampled together.

        Rows of different lengths are padded on the left, and a row that has ended runs on with the others. Rows go by
        length instead if the model has no positions for that beyond its limit, or counts padding as positions.
        """
        limit = _positions(self.model.config)
        room = limit is None or max(prompt_lens) + max_length - min(prompt_lens) <= limit
        if room and self._takes_left_padding:
            return [list(range(len(prompt_lens)))]
        by_length: dict[int, list[int]] = {}
        for row, length in enumerate(prompt_lens):
            by_length.setdefault(length, []).append(row)
        return list(by_length.values())

    def _check_sampling(self, prompts: Sequence[Sequence[int]], max_length: int, temperature: float) -> None:
        if len(prompts) == 0:
            raise ValueError("prompts must hold at least one prompt, got none")
        if not 2 <= max_length <= self.max_length:
            raise ValueError(f"max_length must be in [2, {self.max_length}], got {max_length}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        for i, prompt in enumerate(prompts):
            if not 1 <= len(prompt) < max_length:
                raise ValueError(
                    f"prompt {i} must have a token at least, and leave room for a response within "
                    f"max_length={max_length}, got {len(prompt)} tokens"
                )
            if not (min(prompt) >= 0 and max(prompt) < self.vocab_size):
                raise ValueError(f"prompts must hold ids in [0, {self.vocab_size}), got {min(prompt)}..{max(prompt)}")

    def _checked_head_options(self) -> dict[str, Any] | None:
        """Return softcap and logit scale; None, with a warning, where they do not give the model's logits."""
        try:
            options = head_options(self.model.config)
            difference = self._difference_from_head(options)
            if difference <= HEAD_TOLERANCE[self.model.dtype]:
                return options
            reason = f"the head gives other logits than the model; they differ by {difference:.1e} of the largest"
        except ValueError as error:
            reason = str(error)
        name = type(self.model).__name__
        warnings.warn(f"{name}: its logits are stored, which takes more memory, because {reason}", stacklevel=3)
        return None

    @torch.no_grad()
    def _difference_from_head(self, options: dict[str, Any]) -> float:
        """Return how far hidden states and head are from the logits of a few tokens, as a share of the largest."""
        layer = self.model.get_output_embeddings()
        if self.model.base_model is self.model or not isinstance(layer, nn.Linear):
            raise ValueError("it has no body with a linear head")
        tokens = torch.arange(min(8, self.vocab_size), device=self.model.device)[None]
        expected = self(tokens)
        logits = F.linear(self.hidden(tokens), layer.weight, layer.bias)[..., : self.vocab_size]
        logits = logits * options["logit_scale"]
        if options["softcap"] is not None:
            logits = torch.tanh(logits / options["softcap"]) * options["softcap"]
        largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
        return float((logits - expected).abs().max() / largest)

    @torch.no_grad()
    def _check_left_padding(self) -> bool:
        """Return whether a padded row gets the logits that it gets alone, at its first token and with the cache."""
        first, *others = range(min(4, self.vocab_size))
        drawn = self._continued([[first], others], 2, [], output_logits=True, return_dict_in_generate=True)
        alone = self.model(input_ids=drawn.sequences[:1, -3:-1], use_cache=False).logits[0]
        padded = torch.stack([logits[0] for logits in drawn.logits]).to(alone.dtype)
        return bool((padded - alone).abs().max() <= HEAD_TOLERANCE[alone.dtype] * alone.abs().max())


class _Draw(LogitsProcessor):
    """Leaves one id a row, drawn from the softmax of the logits, so that the greedy search of `generate` takes it."""

    def __init__(self, vocab_size: int, temperature: float, uniform: Tensor, start: int) -> None:
        self._vocab_size, self._temperature, self._uniform, self._start = vocab_size, temperature, uniform, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._start
        drawn = draw(scores[:, : self._vocab_size] / self._temperature, self._uniform[step])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)


@contextmanager
def _own_generation_settings_off(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's generation settings, which `generate` adds to those that it is given."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers, which it also prints to files."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


class HuggingFaceTokenizer:
    """A tokenizer of transformers, with its chat template; fulfils `TextTokenizer`.

    A prompt and a response are tokenized together. The response's tokens are those after the longest beginning that the
    tokens of the prompt, of the prompt with the chosen and of the prompt with the rejected response have in common.

    Attributes:
        name: where the tokenizer came from, for messages.
        tokenizer: the tokenizer.
        vocab_size, bos_id, eos_id, end_ids, pad_id: see `TextTokenizer`. Prompts hold their bos, so `bos_id` is None.
            The end ids are the eos id, those of the model's generation settings, and the token with which the chat
            template ends a message of the assistant.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        strings: Strings | None = None,
        end_ids: Sequence[int] = (),
        name: str = "tokenizer",
    ) -> None:
        """
        Args:
            tokenizer: the tokenizer.
            strings: how to read a string prompt and its responses: "text" as they stand, "chat" as a user message and
                replies of the assistant. None: as they stand, unless there is a chat template; then strings are
                refused, because they can be read in both ways.
            end_ids: further ids that end a response.
            name: for messages.

        Raises:
            ValueError: the tokenizer gives no tokens, no id ends a response, or `strings` needs a chat template.
        """
        self.name, self.tokenizer = name, tokenizer
        if strings == "chat" and not tokenizer.chat_template:
            raise ValueError(f"strings must be text for {name}, which has no chat template, got chat")
        if not all(self._ids(["a", "The end."])):
            raise ValueError(
                f"{name} gives no tokens for a text: its files do not fit its class {type(tokenizer).__name__}"
            )
        self._strings = strings
        self.vocab_size, self.bos_id = max(tokenizer.get_vocab().values()) + 1, None
        ends = [*([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), *end_ids]
        if not ends:
            raise ValueError(f"{name} must have an eos token, got none")
        self.eos_id: int = ends[0]
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._start = self._ids_before_text()
        self.end_ids = frozenset(ends)
        self.end_ids |= self._turn_end()

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of prompts, with their bos; see `TextTokenizer.encode_prompts`."""
        if self._as_chat():
            conversations = (human_assistant_messages(text) or _user(text) for text in texts)
            return self._ids([self._rendered(messages, None) for messages in conversations])
        prompts = [[*self._start_of(ids), *ids] for ids in self._ids(texts)]
        if not all(prompts):
            raise ValueError(f"a prompt must not be empty, because {self.name} has no bos token to begin with")
        return prompts

    def encode_pair(self, prompt: str | Sequence[Message], chosen: str | Message, rejected: str | Message) -> PairIds:
        """Tokenize a pair; see `TextTokenizer.encode_pair`."""
        texts = [reply for reply in (chosen, rejected) if isinstance(reply, str)]
        messages = [reply for reply in (chosen, rejected) if not isinstance(reply, str)]
        if isinstance(prompt, str):
            if not self._as_chat():
                return self._encode_texts(prompt, texts, "as plain text")
            before = human_assistant_messages(prompt)
            if before is not None:  # a reply then begins with the space after "Assistant:"
                texts = [text.strip() for text in texts]
            messages = [{"role": "assistant", "content": text} for text in texts]
            return self._encode_chat(
                before or _user(prompt), messages, "as user messages and replies, by the chat template"
            )
        if self.tokenizer.chat_template:
            return self._encode_chat(prompt, messages, "by the chat template")
        lines = [reply_as_line(reply) for reply in messages]
        return self._encode_texts(prompt_as_lines(prompt), lines, "as lines `role: content`")

    def decode_prompt(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt, with the markers of the chat template, without bos."""
        before = 1 if ids and ids[0] in {self.tokenizer.bos_token_id, *self._start} else 0
        return self._decode(ids[before:], skip_special_tokens=False)

    def decode_response(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        """Return the text of a response that stands after a prompt, without special tokens."""
        # Some tokenizers drop a space in front of a text, so the response is decoded in its place.
        before, whole = (self._decode(ids, skip_special_tokens=True) for ids in (prompt, [*prompt, *response]))
        if whole.startswith(before):
            return whole[len(before) :]
        return self._decode(response, skip_special_tokens=True)

    def save_in(self, folder: StrPath) -> None:
        """Write the tokenizer's files, the chat template among them, into the folder of a model."""
        self.tokenizer.save_pretrained(folder)

    def pieces(self) -> dict[str, int]:
        """Return the tokens with their ids."""
        return self.tokenizer.get_vocab()

    def check_fits(self, model: LanguageModel, model_name: str = "the model") -> None:
        """Raise ValueError unless the model has one logit per id."""
        if model.vocab_size != self.vocab_size:
            raise ValueError(
                f"{self.name} has {self.vocab_size} ids and does not fit {model_name}, "
                f"whose vocab_size is {model.vocab_size}"
            )

    def _as_chat(self) -> bool:
        if self._strings is None and self.tokenizer.chat_template:
            raise ValueError(
                f"strings can be read in two ways, because {self.name} has a chat template: pass --strings chat for a "
                "user message and the assistant's reply, or --strings text for the strings as they stand"
            )
        return self._strings == "chat"

    def _encode_chat(self, prompt: Sequence[Message], replies: Sequence[Message], read_as: str) -> PairIds:
        for message in (*prompt, *replies):
            texts = [text for text in message.values() if isinstance(text, str)]
            for token in self._special:
                if any(token in text for text in texts):
                    raise RowError(f"a message of the {message['role']} has the special token {token}")
        start = self._rendered(prompt, None)
        rendered = [self._rendered(prompt, reply) for reply in replies]
        for text in rendered:
            if not text.startswith(start):
                raise RowError(
                    "the chat template renders the prompt in another way when a reply follows: "
                    f"{start[-40:]!r} is no beginning of the text with the reply"
                )
        before, *whole = self._ids([start, *rendered])
        return self._encoded(before, whole, read_as)

    def _encode_texts(self, prompt: str, replies: Sequence[str], read_as: str) -> PairIds:
        before, *whole = self._ids([prompt, *(prompt + reply for reply in replies)])
        start = self._start_of(before)
        return self._encoded([*start, *before], [[*start, *ids] for ids in whole], read_as)

    def _encoded(self, prompt: list[int], texts: list[list[int]], read_as: str) -> PairIds:
        shared = min(_common_length(prompt, text) for text in texts)
        if shared == 0:
            raise RowError(
                "no token stands before the response: the prompt is empty, or part of the response's first token"
            )
        chosen, rejected = (self._ended(text[shared:]) for text in texts)
        return PairIds(prompt[:shared], chosen, rejected, inside_token=shared < len(prompt), read_as=read_as)

    def _ended(self, response: list[int]) -> list[int]:
        """Return a response that ends with an end id: without blanks after the one it has, or with eos."""
        last = next((i for i in reversed(range(len(response))) if response[i] in self.end_ids), None)
        if last is not None and not self._decode(response[last + 1 :], skip_special_tokens=False).strip():
            return response[: last + 1]
        return [*response, self.eos_id]

    def _rendered(self, prompt: Sequence[Message], reply: Message | None) -> str:
        messages = [dict(message) for message in (*prompt, *([] if reply is None else [reply]))]
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=FIXED_DATE + self.tokenizer.get_chat_template(),
                tokenize=False,
                add_generation_prompt=reply is None,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise RowError(f"the chat template refuses the messages: {error}") from error

    def _turn_end(self) -> frozenset[int]:
        """Return the special token that the chat template puts after a message of the assistant, if it puts one."""
        content = "2718281828"
        try:
            text = (
                self._rendered(_user("a"), {"role": "assistant", "content": content})
                if self.tokenizer.chat_template
                else ""
            )
        except RowError:  # every pair that is rendered will say so
            text = ""
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        after = self._ids([text.rpartition(content)[2]])[0] if content in text else []
        return frozenset([next(i for i in after if i in special)] if special & set(after) else [])

    def _ids_before_text(self) -> list[int]:
        """Return the ids that the tokenizer puts in front of a text, usually its bos or none."""
        (text,), whole = self._ids(["a"]), self.tokenizer("a").input_ids
        places = range(len(whole) - len(text) + 1)
        return next((whole[:place] for place in places if whole[place : place + len(text)] == text), [])

    def _start_of(self, prompt: list[int]) -> list[int]:
        """Return the ids that belong in front of a prompt: none if it has them, and a bos if it is empty."""
        if not prompt and not self._start and self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id]
        return [] if prompt[: len(self._start)] == self._start else self._start

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids

    def _decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )


def load_pretrained(
    source: str,
    device: str | torch.device = "cpu",
    *,
    max_length: int | None = None,
    strings: Strings | None = None,
) -> tuple[HuggingFaceModel, HuggingFaceTokenizer]:
    """Read a model and its tokenizer from a folder or from the Hugging Face hub; the weights become float32.

    Args:
        source: the folder, or "owner/name" of a model of the hub.
        device: where the model goes.
        max_length: the most tokens of a sequence; None takes `DEFAULT_MAX_LENGTH`, or fewer if the model has fewer.
        strings: see `HuggingFaceTokenizer`.

    Raises:
        ValueError: the model or the tokenizer cannot be read, or cannot be trained; or `max_length` is not in the
            model's range.
    """
    if (Path(source) / "adapter_config.json").exists() and not (Path(source) / "config.json").exists():
        raise ValueError(f"{source} is an adapter without its model: merge it into its base model first")
    what = source
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("the weights are quantized, and training needs whole ones")
        with _no_progress_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
        what = f"the tokenizer of {source}"
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{what} cannot be loaded by transformers: {' '.join(str(error).split())}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(str(key) for key in (*info["missing_keys"], *info["mismatched_keys"]))
        raise ValueError(f"{source} lacks {len(lacking)} weights of {type(model).__name__}, first {lacking[0]}")
    ends = model.generation_config.eos_token_id if model.generation_config else None
    text = HuggingFaceTokenizer(
        tokenizer,
        strings=strings,
        end_ids=[] if ends is None else [ends] if isinstance(ends, int) else ends,
        name=f"the tokenizer of {source}",
    )
    limits = (_positions(model.config), tokenizer.model_max_length)
    limit = min(limit for limit in limits if limit is not None)
    if max_length is not None and not 2 <= max_length <= limit:
        raise ValueError(f"max_length must be in [2, {limit}] for {source}, got {max_length}")
    policy = HuggingFaceModel(
        model.to(device),
        vocab_size=text.vocab_size,
        max_length=min(DEFAULT_MAX_LENGTH, limit) if max_length is None else max_length,
        end_ids=sorted(text.end_ids),
        pad_id=text.pad_id,
    )
    return policy, text


def _user(prompt: str) -> list[Message]:
    return [{"role": "user", "content": prompt}]


def _positions(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
