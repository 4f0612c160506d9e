"""Prompts and responses as tokens of transformers' tokenizers, with and without a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason='needs transformers: pip install "spo_kernels[hf]"')

from tiny_transformers import CHATML, make_tokenizer
from transformers import PreTrainedTokenizerFast

from spo_train.errors import RowError
from spo_train.models.huggingface import HuggingFaceTokenizer, load_pretrained
from spo_train.pair_data import load_pairs
from spo_train.protocol import Sequences
from spo_train.sampling import Prompts, sample_texts

CHAT_TOKENS = ["<|endoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER = [{"role": "user", "content": "tell me"}]


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chatml(template: str = CHATML, **options: Any) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(make_tokenizer(CHAT_TOKENS, template=template), **options)


def texts(tokenizer: HuggingFaceTokenizer, *ids: list[int]) -> list[str]:
    return [tokenizer.tokenizer.decode(part) for part in ids]


def with_bos(**options: Any) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(make_tokenizer(["<pad>", "</s>", "<s>"], bos=True), **options)


def test_a_conversation_ends_with_the_token_that_ends_a_turn() -> None:
    tokenizer = chatml()
    ids = tokenizer.encode_pair(USER, reply("a cat"), reply(""))
    assert ids.read_as == "by the chat template"
    assert texts(tokenizer, ids.prompt, ids.chosen, ids.rejected) == [
        "<|im_start|>user\ntell me<|im_end|>\n<|im_start|>assistant\n",
        "a cat<|im_end|>",
        "<|im_end|>",
    ]
    whole = tokenizer.tokenizer.apply_chat_template([*USER, reply("a cat")], tokenize=False)
    assert [*ids.prompt, *ids.chosen] == tokenizer.tokenizer(whole).input_ids[:-1]  # a line break follows
    im_end = tokenizer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.chosen[-1] == im_end
    assert im_end in tokenizer.end_ids
    assert tokenizer.eos_id == 0
    assert tokenizer.decode_prompt(ids.prompt) == texts(tokenizer, ids.prompt)[0]
    assert tokenizer.decode_response(ids.prompt, ids.chosen) == "a cat"


def test_special_tokens_before_a_reply_do_not_end_it() -> None:
    channels = CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<|final|>{% endif %}{{ m.content }}")
    tokenizer = HuggingFaceTokenizer(make_tokenizer([*CHAT_TOKENS, "<|final|>"], template=channels))
    assert texts(tokenizer, *([end] for end in sorted(tokenizer.end_ids))) == ["<|endoftext|>", "<|im_end|>"]
    ids = tokenizer.encode_pair(USER, reply("a cat"), reply("a dog"))
    assert texts(tokenizer, ids.chosen) == ["<|final|>a cat<|im_end|>"]


def test_a_template_without_an_end_gets_eos() -> None:
    lines = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    lines += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = chatml(lines)
    ids = tokenizer.encode_pair(USER, reply("a cat"), reply("a dog"))
    assert texts(tokenizer, ids.chosen) == [" a cat\n<|endoftext|>"]
    # The tokens of " a" begin in the prompt, with the space after "assistant:".
    assert ids.inside_token
    assert texts(tokenizer, ids.prompt) == ["user: tell me\nassistant:"]


def test_the_bos_of_a_template_stands_once(folders: dict[str, Path]) -> None:
    _, tokenizer = load_pretrained(str(folders["gemma2"]))
    ids = tokenizer.encode_pair(USER, reply(" a cat "), reply("a dog"))
    assert ids.prompt.count(2) == 1
    assert ids.prompt[0] == 2
    assert texts(tokenizer, ids.chosen) == ["a cat<end_of_turn>"]  # this template trims
    assert tokenizer.end_ids == {1, 4}
    assert tokenizer.decode_prompt(ids.prompt) == "<start_of_turn>user\ntell me<end_of_turn>\n<start_of_turn>model\n"
    with pytest.raises(RowError, match="the chat template refuses the messages: no system role"):
        tokenizer.encode_pair([{"role": "system", "content": "x"}, *USER], reply("a"), reply("b"))


def test_a_prompt_that_changes_when_a_reply_follows_is_refused() -> None:
    changing = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    with pytest.raises(RowError, match="renders the prompt in another way when a reply follows"):
        chatml(changing).encode_pair(USER, reply("a cat"), reply("a dog"))
    counted = "{{ messages | length }}" + CHATML
    with pytest.raises(RowError, match="renders the prompt in another way"):
        chatml(counted).encode_pair(USER, reply("a cat"), reply("a dog"))


def test_special_tokens_in_a_message_are_refused() -> None:
    tokenizer = chatml(strings="chat")
    for prompt, answer in (
        (USER, "a<|im_end|>\n<|im_start|>user\nb"),
        ([{"role": "user", "content": "<|im_end|>"}], "a"),
    ):
        with pytest.raises(RowError, match=r"a message of the (user|assistant) has the special token <\|im_"):
            tokenizer.encode_pair(prompt, reply(answer), reply("b"))
    with pytest.raises(RowError, match="special token"):
        tokenizer.encode_pair([{"role": "user<|im_end|>", "content": "a"}], reply("a"), reply("b"))
    with pytest.raises(RowError, match="special token"):
        tokenizer.encode_pair("<|im_start|>", "a", "b")


def test_a_date_in_a_template_is_the_same_every_day() -> None:
    tokenizer = chatml("{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert texts(tokenizer, tokenizer.encode_pair(USER, reply("a"), reply("b")).prompt)[0].startswith("01 Jan 2025<")


def test_other_fields_of_messages_reach_the_template() -> None:
    tokenizer = chatml(CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.tools }}"))
    ids = tokenizer.encode_pair(USER, reply("a") | {"tools": "hammer"}, reply("b"))
    assert texts(tokenizer, ids.chosen, ids.rejected) == ["ahammer<|im_end|>", "b<|im_end|>"]


def test_strings_beside_a_template_must_be_explained() -> None:
    for ask in (lambda t: t.encode_pair("tell me", " a", " b"), lambda t: t.encode_prompts(["tell me"])):
        with pytest.raises(ValueError, match="can be read in two ways.*--strings chat.*--strings text"):
            ask(chatml())
    chat = chatml(strings="chat")
    ids = chat.encode_pair("tell me", "a cat", "a dog")
    assert (ids.prompt, ids.chosen) == chatml().encode_pair(USER, reply("a cat"), reply("a dog"))[:2]
    assert chat.encode_prompts(["tell me"]) == [ids.prompt]
    text = chatml(strings="text")
    ids = text.encode_pair("tell me", " a cat", " a dog")
    assert texts(text, ids.prompt, ids.chosen) == ["tell me", " a cat<|endoftext|>"]
    with pytest.raises(ValueError, match="strings must be text for tokenizer, which has no chat template, got chat"):
        with_bos(strings="chat")


def test_human_and_assistant_become_messages() -> None:
    prompt, answers = "\n\nHuman: tell me\n\nAssistant: hello\n\nHuman: a story\n\nAssistant:", (" a cat", " a dog")
    messages = [USER[0], reply("hello"), {"role": "user", "content": "a story"}]
    expected = chatml().encode_pair(messages, reply("a cat"), reply("a dog"))
    assert chatml(strings="chat").encode_pair(prompt, *answers)[:3] == expected[:3]
    text = with_bos()
    ids = text.encode_pair(prompt, *answers)
    assert texts(text, ids.prompt, ids.chosen) == ["<s>" + prompt, " a cat</s>"]


def test_text_is_tokenized_with_its_response() -> None:
    tokenizer = with_bos()
    assert len(tokenizer.tokenizer(" story", add_special_tokens=False).input_ids) == 1
    ids = tokenizer.encode_pair("tell me a st", "ory", "ill cat")
    # "story" is one token of the text, so no token ends where the prompt ends.
    assert ids.inside_token
    assert texts(tokenizer, ids.prompt, ids.chosen, ids.rejected) == ["<s>tell me a", " story</s>", " still cat</s>"]
    assert [*ids.prompt, *ids.chosen[:-1]] == tokenizer.tokenizer("tell me a story").input_ids
    ids = tokenizer.encode_pair("tell me", " a story</s>", " a")
    assert not ids.inside_token
    assert texts(tokenizer, ids.chosen) == [" a story</s>"]
    # A prompt that was rendered with its bos keeps one.
    assert tokenizer.encode_pair("<s>tell me", " a", " b").prompt == tokenizer.encode_pair("tell me", " a", " b").prompt


def test_an_empty_prompt_is_the_bos_or_refused() -> None:
    tokenizer = with_bos()
    ids = tokenizer.encode_pair("", "a cat", "a dog")
    assert ids.prompt == [2]
    assert tokenizer.encode_prompts([""]) == [[2]]
    assert tokenizer.decode_prompt([2]) == ""
    without = chatml(strings="text")
    with pytest.raises(RowError, match="no token stands before the response"):
        without.encode_pair("", "a cat", "a dog")
    with pytest.raises(ValueError, match="a prompt must not be empty"):
        without.encode_prompts(["a", ""])
    # GPT-2's tokenizer has a bos, but does not put it before texts.
    gpt2 = make_tokenizer(["<|endoftext|>", "<|endoftext|>"])
    gpt2.bos_token = "<|endoftext|>"
    assert HuggingFaceTokenizer(gpt2).encode_pair("", "a cat", "a dog").prompt == [0]


def test_a_space_at_the_start_of_a_response_is_kept() -> None:
    tokenizer = with_bos()
    prompt, response = (
        tokenizer.tokenizer("tell").input_ids,
        tokenizer.tokenizer(" me", add_special_tokens=False).input_ids,
    )
    assert tokenizer.decode_response(prompt, [*response, 1]) == " me"


def test_messages_without_a_template_are_lines() -> None:
    tokenizer = with_bos()
    system = {"role": "system", "content": "one day"}
    ids = tokenizer.encode_pair([system, *USER], reply("a cat"), reply("a dog"))
    assert ids.read_as == "as lines `role: content`"
    assert texts(tokenizer, ids.prompt, ids.chosen) == ["<s>system: one day\nuser: tell me\nassistant:", " a cat</s>"]
    with pytest.raises(RowError, match="a message has name, for which the tokenizer has no chat template"):
        tokenizer.encode_pair([USER[0] | {"name": "Tom"}], reply("a"), reply("b"))


def test_a_tokenizer_that_gives_no_tokens_is_refused() -> None:
    class Silent(PreTrainedTokenizerFast):
        def __call__(self, *args: Any, **options: Any) -> Any:
            encoded = super().__call__(*args, **options)
            encoded["input_ids"] = [[] for _ in encoded["input_ids"]]
            return encoded

    silent = Silent(tokenizer_object=make_tokenizer(["<pad>", "</s>"])._tokenizer, eos_token="</s>")
    with pytest.raises(ValueError, match="gives no tokens for a text: its files do not fit its class Silent"):
        HuggingFaceTokenizer(silent)


def test_a_file_of_conversations_as_batches(chat_file: Path, folders: dict[str, Path]) -> None:
    _, tokenizer = load_pretrained(str(folders["qwen2"]))
    pairs, report = load_pairs(chat_file, tokenizer, max_length=40)
    assert report.kinds == {"messages by the chat template": 24}
    rows = [json.loads(line) for line in chat_file.read_text().splitlines()]
    batch = pairs.batch([0, 1])
    for row, tokens, start, end in zip(
        [*rows[:2], *rows[:2]], batch.tokens, batch.prompt_lens, batch.lengths, strict=True
    ):
        prompt = row.get("prompt", row["chosen"][:1])[0]["content"]
        assert tokenizer.decode_prompt(tokens[:start].tolist()).split("\n")[1] == prompt + "<|im_end|>"
        assert int(tokens[end - 1]) in tokenizer.end_ids
    # The end of a turn is a target, and the prompt is none.
    labels = batch.labels()
    assert (labels != -100).sum(1).tolist() == (batch.lengths - batch.prompt_lens).tolist()
    prompts = Prompts.of_ids(pairs.prompts([0, 1, 0]), tokenizer)
    assert len(prompts.ids) == 2
    assert prompts.texts[0].endswith("<|im_start|>assistant\n")


def test_a_sampled_text_is_finished_by_the_end_of_a_turn() -> None:
    tokenizer = chatml(strings="chat")
    prompts = Prompts.encode(["tell me"], tokenizer, max_length=40)
    replies = [tokenizer.encode_pair("tell me", text, "")[1] for text in ("a cat", "a dog")]
    rows = torch.tensor([prompts.ids[0] + reply for reply in replies])
    start, end = len(prompts.ids[0]), rows.shape[1]
    lengths = torch.tensor([end, end - 1])  # the second is cut before the end of its turn

    class Model:
        def sample(self, *_: Any, **__: Any) -> Sequences:
            return Sequences(rows, torch.tensor([start, start]), lengths)

    ((texts, _),) = sample_texts(
        Model(),
        tokenizer,
        lambda text, finished: {"score": len(text) if finished else 0.0},
        prompts,
        [0, 0],
        max_length=40,
        temperature=1.0,
        batch_size=2,
        generator=torch.Generator(),
    )
    rendered = "<|im_start|>user\ntell me<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.given == ["tell me"]
    assert [text.text for text in texts] == [rendered + "a cat", rendered + "a dog"]
    assert [(text.finished, text.score) for text in texts] == [(True, len(rendered) + 5), (False, 0.0)]


def test_bad_conversations_are_left_out_with_a_reason(tmp_path: Path, folders: dict[str, Path]) -> None:
    _, tokenizer = load_pretrained(str(folders["gemma2"]))
    rows: list[dict[str, Any]] = [
        {"prompt": USER, "chosen": [reply("a cat")], "rejected": [reply("a dog")]},
        {"prompt": [{"role": "system", "content": "x"}], "chosen": [reply("a cat")], "rejected": [reply("a dog")]},
        {"prompt": USER, "chosen": [reply("a<eos>b")], "rejected": [reply("a dog")]},
        {"prompt": USER, "chosen": [reply("a cat ")], "rejected": [reply(" a cat")]},
        {"prompt": [{"role": "user", "content": "dog " * 60}], "chosen": [reply("a")], "rejected": [reply("b")]},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, report = load_pairs(path, tokenizer, max_length=64)
    assert [(number, reason.split(":")[0]) for number, reason in report.problems] == [
        (2, "the chat template refuses the messages"),
        (3, "a message of the assistant has the special token <eos>"),
        (4, "chosen and rejected are the same"),
        (5, "prompt too long"),
    ]
