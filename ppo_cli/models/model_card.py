"""The model card that `PPOTrainer.save_pretrained` writes, and what all cards share."""

from __future__ import annotations

from typing import Any

from ppo_cli.utils.text import json_text, markdown_code, markdown_text

HEADER = """---
library_name: transformers
tags:
- ppo
- reinforcement-learning
- text-generation
{base}---
"""

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


def trainer_card(model_name: str, path: str, config: Any) -> str:
    """The card that `PPOTrainer.save_pretrained` writes."""
    return (
        HEADER.format(base="") + f"\n# {markdown_text(model_name)}\n\n"
        "A language model tuned with Proximal Policy Optimization by ppo-cli, from "
        f"{markdown_code(str(config.model_name))}.\n\n" + USAGE.format(path=json_text(path))
    )
