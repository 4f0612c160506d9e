"""Judges of texts, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    score = load_function(name, "judge", ["stories"])
    return lambda text, _finished: {"score": float(score(text))}


def load_function(name: str, setting: str, names: Sequence[str]) -> Callable[..., Any]:
    """Return the function called "module:function".

    Args:
        setting: whose value `name` is, for the error's text.
        names: the other values of the setting, for the error's text.

    Raises:
        ValueError: there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        others = ", ".join(f'"{other}"' for other in names)
        raise ValueError(
            f'{setting} must be {others} or an importable "module:function", got {name!r}: {error}'
        ) from error
    return function
