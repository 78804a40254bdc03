"""Run by torchrun in two processes: each takes two PPO steps on a batch of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import make_batch, make_gpt2, make_tokenizer

from ppo_cli import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

torch.manual_seed(0)
policy = AutoModelForCausalLMWithValueHead(make_gpt2(), summary_dropout_prob=0.0)
config = PPOConfig(
    batch_size=8,
    mini_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    accelerator_kwargs={"cpu": True},
)
trainer = PPOTrainer(config, policy, None, make_tokenizer())
rank = trainer.accelerator.process_index
queries, _, scores = make_batch(seed=rank)
before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).clone()
for _ in range(2):
    responses = trainer.generate(queries, max_new_tokens=6, return_prompt=False, eos_token_id=-1)
    stats = trainer.step(queries, responses, scores)
after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
everyone = trainer.accelerator.gather(after.unsqueeze(0))
drawn = trainer.accelerator.gather(torch.stack(responses).unsqueeze(0))
means = trainer.accelerator.gather(torch.tensor([stats["ppo/mean_scores"]]))
assert trainer.accelerator.num_processes == 2
assert torch.equal(everyone[0], everyone[1]), "the processes' weights differ"
assert not torch.equal(before, after)
assert not torch.equal(drawn[0], drawn[1]), "the processes drew the same samples"
assert means[0] == means[1], "statistics are not the processes' mean"
assert config.global_batch_size == 16
# gloo's threads may outlive the interpreter and abort it: end them first, when both are done.
trainer.accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)
