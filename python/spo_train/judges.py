"""Judges of texts, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

# Takes a text, and whether its author ended it: False if a length limit cut it off. Returns features, of which "score"
# decides a comparison.
Judge = Callable[[str, bool], Mapping[str, float]]


def load_judge(name: str) -> Judge:
    """Return the judge called `name`.

    Args:
        name: "stories" for the judge of the toy stories, or "module:function" for a function from text to a score.

    Raises:
        ValueError: there is no such module or function.
    """
    if name == "stories":
        from spo_train.toy.judge import story_judge

        return story_judge()
    module_name, _, function_name = name.partition(":")
    try:
        score = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f'judge must be "stories" or an importable "module:function", got {name!r}: {error}'
        ) from error
    return lambda text, _finished: {"score": float(score(text))}
