"""The default domain: stories from a grammar, and a judge that stands in for a human or model rater."""

from __future__ import annotations

from spo_train.stories.grammar import stories, story
from spo_train.stories.judge import Assessment, StoryJudge

__all__ = ["Assessment", "StoryJudge", "stories", "story"]
