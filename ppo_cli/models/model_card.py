"""Model cards: their metadata, the part on use, and the card of `PPOTrainer.save_pretrained`."""

from __future__ import annotations

from typing import Any

from ppo_cli.utils.text import escape_controls, json_text, markdown_code, markdown_text

CAUSAL, SEQ2SEQ = "text-generation", "text2text-generation"
"""The hub's names of what a causal model does, and an encoder-decoder."""

USAGE = """## Use

```python
{example}
```

With its value head, to train on:

```python
from ppo_cli import {policy}

policy = {policy}.from_pretrained({path})
```
"""
EXAMPLES = {
    CAUSAL: """from transformers import pipeline

generator = pipeline("text-generation", model={path})
print(generator("This movie", max_new_tokens=20, do_sample=True))""",
    SEQ2SEQ: """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({path})
model = AutoModelForSeq2SeqLM.from_pretrained({path})
query = tokenizer("This movie", return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**query, max_new_tokens=20, do_sample=True)))""",
}
POLICIES = {
    CAUSAL: "AutoModelForCausalLMWithValueHead",
    SEQ2SEQ: "AutoModelForSeq2SeqLMWithValueHead",
}


def make_card(body: str, task: str = CAUSAL, **metadata: Any) -> str:
    """A model card.

    Args:
        body: its text, as Markdown.
        task: `CAUSAL` or `SEQ2SEQ`.
        metadata: of `huggingface_hub.ModelCardData`, beside library, task and tags.
    """
    from huggingface_hub import ModelCard, ModelCardData

    tags = ["ppo", "reinforcement-learning", task, "ppo-cli"]
    data = ModelCardData(library_name="transformers", pipeline_tag=task, tags=tags, **metadata)
    # Names come from files and models; pages show metadata as HTML.
    shown = data.to_yaml().replace("<", "").replace(">", "").split("\n")
    return str(ModelCard("\n".join(["---", *map(escape_controls, shown), "---", "", body])))


def task_of(model: Any) -> str:
    """`SEQ2SEQ` for an encoder-decoder, else `CAUSAL`; of a policy or a `PPOConfig`."""
    return SEQ2SEQ if getattr(model, "is_encoder_decoder", False) else CAUSAL


def usage(name: str, task: str = CAUSAL) -> str:
    """The part of a card that says how to load the model, by folder or hub id."""
    path = json_text(name)
    example = EXAMPLES[task].format(path=path)
    return USAGE.format(path=path, example=example, policy=POLICIES[task])


def trainer_card(model_name: str, path: str, config: Any) -> str:
    """The card that `PPOTrainer.save_pretrained` writes."""
    task = task_of(config)
    return make_card(
        f"# {markdown_text(model_name)}\n\n"
        "A language model tuned with Proximal Policy Optimization by ppo-cli, from "
        f"{markdown_code(str(config.model_name))}.\n\n" + usage(path, task),
        task,
    )
