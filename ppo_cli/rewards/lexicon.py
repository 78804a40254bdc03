"""Lexicons as rewards: a text's sentiment by its words, without a model."""

from __future__ import annotations

from ppo_cli.errors import MissingPackageError
from ppo_cli.rewards.batch import RewardBatch, filled


class VaderReward:
    """VADER's compound score of a text, -1 to 1 (Hutto and Gilbert 2014, ICWSM).

    Args:
        template: the text that is scored, with {text}, {query} and {response}.

    Raises:
        MissingPackageError: vaderSentiment is not installed.
    """

    name = "vader"

    def __init__(self, template: str = "{text}") -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise MissingPackageError(
                "lexicon vader needs the package vaderSentiment: pip install 'ppo-cli[lexicon]'"
            ) from error
        self._analyzer = SentimentIntensityAnalyzer()
        self._template = template

    def __call__(self, batch: RewardBatch) -> list[float]:
        """A score for each response."""
        texts = filled(self._template, batch)
        return [float(self._analyzer.polarity_scores(text)["compound"]) for text in texts]
