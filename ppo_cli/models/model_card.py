"""Model cards: their metadata, the part on use, and the card of `PPOTrainer.save_pretrained`."""

from __future__ import annotations

from typing import Any

from ppo_cli.utils.text import escape_controls, json_text, markdown_code, markdown_text

TAGS = ["ppo", "reinforcement-learning", "text-generation", "ppo-cli"]

USAGE = """## Use

```python
from transformers import pipeline

generator = pipeline("text-generation", model={path})
print(generator("This movie", max_new_tokens=20, do_sample=True))
```

With its value head, to train on:

```python
from ppo_cli import AutoModelForCausalLMWithValueHead

policy = AutoModelForCausalLMWithValueHead.from_pretrained({path})
```
"""


def make_card(body: str, **metadata: Any) -> str:
    """A model card.

    Args:
        body: its text, as Markdown.
        metadata: of `huggingface_hub.ModelCardData`, beside library, task and tags.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=[*TAGS], **metadata
    )
    # Names come from files and models; pages show metadata as HTML.
    shown = data.to_yaml().replace("<", "").replace(">", "").split("\n")
    return str(ModelCard("\n".join(["---", *map(escape_controls, shown), "---", "", body])))


def usage(name: str) -> str:
    """The part of a card that says how to load the model, by folder or hub id."""
    return USAGE.format(path=json_text(name))


def trainer_card(model_name: str, path: str, config: Any) -> str:
    """The card that `PPOTrainer.save_pretrained` writes."""
    return make_card(
        f"# {markdown_text(model_name)}\n\n"
        "A language model tuned with Proximal Policy Optimization by ppo-cli, from "
        f"{markdown_code(str(config.model_name))}.\n\n" + usage(path)
    )
