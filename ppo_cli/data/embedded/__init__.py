"""The embedded world: an offline grammar of film reviews and two small models trained on it.

Kept to the standard library, so that asking where the models are costs nothing.
"""

from __future__ import annotations

from pathlib import Path

# Seeds for prompt texts. The models are trained on reviews from other seeds (see ``build``).
TRAIN_SEED = 20_001
HELD_OUT_SEED = 30_001

_HERE = Path(__file__).resolve().parent


def policy_folder() -> Path:
    """The small causal language model that writes reviews, as a transformers folder."""
    return _HERE / "policy"


def classifier_folder() -> Path:
    """The small sentiment classifier, with its own tokenizer, as a transformers folder."""
    return _HERE / "classifier"


__all__ = ["HELD_OUT_SEED", "TRAIN_SEED", "classifier_folder", "policy_folder"]
