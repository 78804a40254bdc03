"""Recipes whose models and data are on the hub, with small ones of the same kind in their place."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

from ppo_cli.config.loading import load_config
from ppo_cli.data.embedded import classifier_folder
from ppo_cli.training.build import build_training


def test_detoxify_continues_toxic_comments_and_is_rewarded_for_the_label_nothate(
    tmp_path: Path,
) -> None:
    classifier = tmp_path / "classifier"
    shutil.copytree(classifier_folder(), classifier)
    config = json.loads((classifier / "config.json").read_text())
    config["id2label"] = {"0": "nothate", "1": "hate"}
    (classifier / "config.json").write_text(json.dumps(config))
    with (tmp_path / "comments.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["comment_text", "label"])
        for i in range(32):
            kind = "nasty" if i % 2 else "kind"
            writer.writerow([f"{kind} comment {i}, which goes on for a while " * 3, i % 2])
    changes = {
        "policy.model": "embedded",
        "prompts.source": tmp_path / "comments.csv",
        "prompts.held_out": 4,
        "reward.model": classifier,
        "ppo.batch_size": 4,
        "ppo.mini_batch_size": 4,
        "run.output": tmp_path / "run",
    }
    assignments = [f"{key}={value}" for key, value in changes.items()]
    training = build_training(load_config("detoxify", assignments=assignments))
    prompts = [*training.prompts.train, *training.prompts.held_out]
    assert len(prompts) == 16
    assert all(prompt.query.startswith("nasty") for prompt in prompts)
    assert training.reward.label == "nothate"
    made = training.ppo_step.run(0)
    assert made.statistics["env/score_scale"] > 0
    assert "env/repetition_cost" in made.statistics
    (reward,) = training.reward.classifiers
    texts = [sample.query + sample.response for sample in made.samples]
    nothate = reward.of_labels(texts)[0][:, 0].tolist()
    assert [round(sample.score or 0, 3) for sample in made.samples] == [
        round(x, 3) for x in nothate
    ]
