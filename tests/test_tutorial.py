"""The classic tutorial's notebook, its code in its order: only imports and model names differ.

Then the code of docs/tutorial.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, pipeline

from ppo_cli import (
    AutoModelForCausalLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
    print_ppo_stats,
    set_seed,
)
from ppo_cli.data.embedded import TRAIN_SEED, classifier_folder, policy_folder
from ppo_cli.data.embedded.grammar import reviews
from tests.test_outputs import ROOT, script


@pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")
def test_the_notebook_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_seed(0)
    config = PPOConfig(
        model_name=str(policy_folder()), learning_rate=5e-4, batch_size=16, mini_batch_size=16
    )
    sent_kwargs = {"top_k": None, "function_to_apply": "none", "batch_size": 2}

    model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
    ref_model = create_reference_model(model)
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    tokenizer.pad_token = tokenizer.eos_token

    def build_dataset(
        tokenizer: Any, input_min_text_length: int = 2, input_max_text_length: int = 8
    ) -> Any:
        ds = Dataset.from_dict({"text": [r.text for r in reviews(104, TRAIN_SEED)]})
        ds = ds.rename_columns({"text": "review"})
        ds = ds.filter(lambda x: len(x["review"]) > 40, batched=False)
        input_size = LengthSampler(input_min_text_length, input_max_text_length)

        def tokenize(sample: Any) -> Any:
            sample["input_ids"] = tokenizer.encode(sample["review"])[: input_size()]
            sample["query"] = tokenizer.decode(sample["input_ids"])
            return sample

        ds = ds.map(tokenize, batched=False)
        ds.set_format(type="torch")
        return ds

    dataset = build_dataset(tokenizer)

    def collator(data: Any) -> dict[str, Any]:
        return dict((key, [d[key] for d in data]) for key in data[0])  # noqa: C402

    ppo_trainer = PPOTrainer(
        config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator
    )
    device = ppo_trainer.accelerator.device
    if ppo_trainer.accelerator.num_processes == 1:
        device = 0 if torch.cuda.is_available() else "cpu"
    sentiment_pipe = pipeline(
        "sentiment-analysis",
        model=str(classifier_folder()),
        tokenizer=str(classifier_folder()),
        device=device,
    )
    assert sentiment_pipe("this movie was really bad!!", **sent_kwargs)

    gen_kwargs = {
        "min_length": -1,
        "top_k": 0.0,
        "top_p": 1.0,
        "do_sample": True,
        "pad_token_id": tokenizer.eos_token_id,
    }
    output_length_sampler = LengthSampler(4, 16)
    all_stats = []
    sentiment = "POSITIVE"
    for _epoch, batch in enumerate(ppo_trainer.dataloader):
        query_tensors = batch["input_ids"]
        response_tensors = []
        for query in query_tensors:
            gen_len = output_length_sampler()
            gen_kwargs["max_new_tokens"] = gen_len
            response = ppo_trainer.generate(query, **gen_kwargs)
            response_tensors.append(response.squeeze()[-gen_len:])
        batch["response"] = [tokenizer.decode(r.squeeze()) for r in response_tensors]
        texts = [q + r for q, r in zip(batch["query"], batch["response"], strict=True)]
        pipe_outputs = sentiment_pipe(texts, **sent_kwargs)
        positive_scores = [
            item["score"]
            for output in pipe_outputs
            for item in output
            if item["label"] == sentiment
        ]
        rewards = [torch.tensor(score) for score in positive_scores]
        stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
        ppo_trainer.log_stats(stats, batch, rewards)
        all_stats.append(stats)
    assert len(all_stats) == 6

    for related in (True, False):
        print_ppo_stats(all_stats[-1], related_to_objective=related)
    printed = capsys.readouterr().out
    for key in ("objective/kl", "ppo/loss/total", "ppo/mean_scores", "tokens/responses_len_mean"):
        assert key in printed

    model_dir = str(tmp_path / "ppo-good")
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)

    loss_values = [stat["ppo/loss/total"] for stat in all_stats]
    reward_values = [stat["ppo/mean_scores"] for stat in all_stats]
    plt.plot(loss_values)
    plt.plot(reward_values)
    plt.savefig(tmp_path / "plot.png")
    plt.close()
    assert np.isfinite(loss_values + reward_values).all()

    model_1 = AutoModelForCausalLMWithValueHead.from_pretrained(model_dir).to(device)

    def generate_some_text(input_text: str, my_model: Any) -> str:
        input_ids = tokenizer(input_text, return_tensors="pt").input_ids.to(device)
        generated_ids = my_model.generate(input_ids, **gen_kwargs)
        return tokenizer.decode(generated_ids[0], skip_special_tokens=True)

    assert generate_some_text("This movie", model_1).startswith("This movie")

    def compare_models_on_dataset(model: Any, ref_model: Any, bs: int = 8) -> pd.DataFrame:
        game_data: dict[str, Any] = {}
        dataset.set_format("pandas")
        df_batch = dataset[:].sample(bs, random_state=0)
        game_data["query"] = df_batch["query"].tolist()
        query_tensors = df_batch["input_ids"].tolist()
        responses: dict[str, list[str]] = {"before": [], "after": []}
        for query in query_tensors:
            gen_len = output_length_sampler()
            gen_kwargs["max_new_tokens"] = gen_len
            for name, each in (("before", ref_model), ("after", model)):
                ids = torch.tensor(query).unsqueeze(dim=0).to(device)
                output = each.generate(ids, **gen_kwargs).squeeze()[-gen_len:]
                responses[name].append(tokenizer.decode(output))
        for name, texts in responses.items():
            game_data[f"response ({name})"] = texts
            joined = [q + r for q, r in zip(game_data["query"], texts, strict=True)]
            game_data[f"rewards ({name})"] = [
                item["score"]
                for output in sentiment_pipe(joined, **sent_kwargs)
                for item in output
                if item["label"] == sentiment
            ]
        return pd.DataFrame(game_data)

    table = compare_models_on_dataset(model_1, ref_model)
    assert table.shape == (8, 5)
    assert np.isfinite(table[["rewards (before)", "rewards (after)"]].to_numpy()).all()


SMALLER = {
    "STEPS = 60": "STEPS = 2",
    "batch_size=64": "batch_size=16",
    "reviews(4000,": "reviews(64,",
    "reviews(256,": "reviews(16,",
}


@pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")
def test_the_code_of_the_page_runs_in_an_empty_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    code = script.program(page)
    for old, new in SMALLER.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "tutorial.md", "exec"), {})
    outputs = capsys.readouterr().out.split(script.END)
    assert outputs.pop() == "" and len(outputs) == page.count(script.PYTHON)
    assert all(text.strip() for text in outputs)
    assert any("step 2: mean reward " in text for text in outputs)
    assert outputs[-1].startswith("tuned: mean reward ")
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"tutorial-good", "tutorial-bad", "tutorial.png"}
    plt.close("all")
