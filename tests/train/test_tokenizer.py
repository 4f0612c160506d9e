from __future__ import annotations

from pathlib import Path

import pytest

from spo_train.models.llama import Llama, ModelConfig
from spo_train.tokenizer import BOS_ID, EOS_ID, PAD_ID, Tokenizer

# Spaces at every place, line breaks, and characters that no story has, which become bytes.
TEXTS = ["", " ", "Once upon a time", "  two  spaces ", "a\tb\n\nc\r\n", "Zoë ate 3 naïve 日本 🦊s", 'said, "No!"']


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([BOS_ID, *ids, EOS_ID, PAD_ID, PAD_ID]) == text
    assert not {BOS_ID, EOS_ID, PAD_ID} & set(ids)


@pytest.mark.parametrize("cut", [1, 4, 5, 9])
def test_prompt_and_response_join_seamlessly(tokenizer: Tokenizer, cut: int) -> None:
    text = "Once upon a time"
    assert tokenizer.decode(tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:])) == text


def test_encode_of_several_texts(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    # The text of a special id is ordinary text: it must not end a sequence.
    assert EOS_ID not in tokenizer.encode("</s>")


def test_training_is_deterministic(story_texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a.model")
    Tokenizer.train(story_texts, vocab_size=400).save(tmp_path / "b.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    loaded = Tokenizer.load(tmp_path / "a.model")
    assert loaded.vocab_size == tokenizer.vocab_size == 400
    assert loaded.encode(story_texts[0]) == tokenizer.encode(story_texts[0])


def test_few_words_give_fewer_ids() -> None:
    tokenizer = Tokenizer.train(["the cat sat\non the mat"] * 3, vocab_size=1000)
    assert 260 < tokenizer.vocab_size < 300


def test_train_errors() -> None:
    with pytest.raises(ValueError, match="vocab_size=262"):
        Tokenizer.train(["a text of more than two characters"], vocab_size=262)
    with pytest.raises(ValueError, match="cannot train"):
        Tokenizer.train([], vocab_size=300)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x0a\xff\xff\xff\xff\x0f"])
def test_load_names_the_broken_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.model is (not a sentencepiece model|empty)"):
        Tokenizer.load(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.model"):
        Tokenizer.load(tmp_path / "absent.model")


def test_truncated_file_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "short.model"
    tokenizer.save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"short\.model"):
        Tokenizer.load(path)


def test_check_fits(tokenizer: Tokenizer) -> None:
    sizes = {"dim": 8, "layers": 1, "heads": 1, "ffn_dim": 8}
    tokenizer.check_fits(Llama(ModelConfig(400, **sizes)))
    with pytest.raises(ValueError, match="has 400 ids and does not fit the policy, whose vocab_size is 401"):
        tokenizer.check_fits(Llama(ModelConfig(401, **sizes)), "the policy")
    with pytest.raises(ValueError, match="has eos_id=2 and does not fit the model, which has 0"):
        tokenizer.check_fits(Llama(ModelConfig(400, **sizes, eos_id=0)))
