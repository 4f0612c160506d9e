"""What `SPOTrainer` refuses, before a long run rather than in it."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import ProcessorMixin

# Versions of TRL that the tests run with: from the first, below the second.
TESTED = ("1.16", "1.17")


def check_pairs(dataset: Any, name: str) -> None:
    """ValueError for a dataset whose rows are no preference pairs; reads all rows of a dataset that is no stream."""
    columns = dataset.column_names or list(next(iter(dataset)))
    if "image" in columns or "images" in columns:
        raise ValueError(f"{name} must hold text only, got a column of images: SPOTrainer takes no vision datasets")
    for column in ("chosen", "rejected"):
        if column not in columns:
            hint = ""
            if "completion" in columns and "label" in columns:
                hint = "; unpaired data with labels, as for KTO, has no pairs that SPO could use"
            raise ValueError(f"{name} must have the columns chosen and rejected, got {', '.join(columns)}{hint}")
    if not isinstance(dataset, Dataset):
        _check_row(next(iter(dataset)), name, 0)
        return
    first = 0
    for batch in dataset.select_columns(["chosen", "rejected"]).iter(batch_size=1000):
        for offset, (chosen, rejected) in enumerate(zip(batch["chosen"], batch["rejected"], strict=True)):
            _check_row({"chosen": chosen, "rejected": rejected}, name, first + offset)
        first += len(batch["chosen"])


def _check_row(row: dict[str, Any], name: str, number: int) -> None:
    for column in ("chosen", "rejected"):
        if _is_empty(row[column]):
            raise ValueError(f"{name} must have a response in each row, got an empty {column} in row {number}")
    if row["chosen"] == row["rejected"]:
        raise ValueError(
            f"{name} must have two different responses in each row, got the same chosen and rejected in row {number}; "
            'drop such rows: dataset.filter(lambda row: row["chosen"] != row["rejected"])'
        )


def _is_empty(response: Any) -> bool:
    if response is None or isinstance(response, str):
        return not (response or "").strip()
    # messages: the last one is the response
    if not response:
        return True
    last = response[-1]
    return not (last.get("content") or last.get("tool_calls"))


def check_model(model: Any) -> None:
    """ValueError for a model that is no decoder with a head."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a decoder, got {type(model).__name__}, an encoder-decoder model")
    if model.get_output_embeddings() is None:
        raise ValueError(f"model must have output embeddings, as a causal LM has, got {type(model).__name__}")


def check_adapters(configs: Any) -> None:
    """ValueError for PEFT configurations that do not leave the head and the sequence alone."""
    for config in configs:
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"peft_config must not be prompt learning, which lengthens the sequences, got {type(config).__name__}; "
                "use LoRA"
            )


def check_processing_class(processing_class: Any) -> None:
    """ValueError for a processor of images."""
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"processing_class must be a tokenizer, got {type(processing_class).__name__}: SPOTrainer trains on text; "
            "give the processor's tokenizer"
        )


def check_parallelism(config: Any) -> None:
    """ValueError where each rank holds a part of each sequence, so that sums over responses would miss the others."""
    for name in ("cp", "sp"):
        size = getattr(config, f"{name}_size", 1)
        if size > 1:
            raise ValueError(
                f"parallelism_config must not split sequences over ranks, got {name}_size = {size}: a rank sums the "
                "log-probs of whole responses"
            )


def rows_of(embeddings: Any) -> int:
    """The size of a vocabulary, also where DeepSpeed has taken the weight apart."""
    weight = embeddings.weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def check_vocabularies(policy: Any, reference: Any) -> None:
    """ValueError for a policy and a reference of different vocabularies."""
    for name, get in (("head", "get_output_embeddings"), ("embedding", "get_input_embeddings")):
        ours, theirs = (rows_of(getattr(model, get)()) for model in (policy, reference))
        if ours != theirs:
            raise ValueError(
                f"model and ref_model must have the same vocabulary, got {ours} and {theirs} rows of the {name}; "
                "resize the reference too, and pass it as ref_model: TRL loads it from where the model came from"
            )


def check_samples(samples: int, ranks: int, accumulation: int) -> None:
    """ValueError unless each micro-step of each rank gets the same number of samples."""
    share = ranks * accumulation
    if samples % share:
        raise ValueError(
            f"kl_samples must be a multiple of ranks x gradient_accumulation_steps = {ranks} x {accumulation} = "
            f"{share}, got {samples}; the next is {samples + share - samples % share}"
        )
