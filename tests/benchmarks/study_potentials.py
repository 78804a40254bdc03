"""How well the score of an unfinished text tells the final one; STUDY.md has what came of it.

python study_potentials.py [--config NAME] [--set section.key=value ...] [--tokens 12]
    [--responses 6] [--continued 120] [--continuations 24]

Samples responses of the reference to the training prompts and prints, for every other number of
tokens that are there, what share of the final score's variance is left: given the score so far, a
least-squares line through it, a ridge regression on the reference's hidden states, and given the
text so far itself, of which continuations tell. Fitted on three quarters of the prompts, told of
the rest.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from ppo_cli.config.loading import load_config
from ppo_cli.data.prompts import load_prompts
from ppo_cli.evaluation.draw_samples import draw_rollout
from ppo_cli.models.loading import load_policy, load_tokenizer
from ppo_cli.models.sampling import Rollout
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.rewards.loading import load_reward
from ppo_cli.rewards.partial_scores import potentials

RIDGES = (100.0, 300.0, 1000.0, 3000.0)


def main() -> None:
    """Sample, fit and print a line for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--responses", type=int, default=6)
    parser.add_argument("--continued", type=int, default=120)
    parser.add_argument("--continuations", type=int, default=24)
    arguments = parser.parse_args()
    config = load_config(arguments.config, assignments=arguments.changes)
    tokenizer = load_tokenizer(config.policy.model)
    reference = load_policy(config.policy, tokenizer).eval()
    params = SamplingParams(
        stop_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id
    )
    reward = load_reward(config.reward, torch.device("cpu"))
    prompts = load_prompts(config.prompts, tokenizer, config.run.seed).train

    def draw(queries: list[torch.Tensor], tokens: int, seed: int) -> Rollout:
        return draw_rollout(
            reference, tokenizer, queries, params, max_new_tokens=tokens, seed=seed, batch_size=256
        )

    drawn = draw(
        [p.input_ids for p in prompts for _ in range(arguments.responses)], arguments.tokens, 0
    )
    whole = [i for i, r in enumerate(drawn.responses) if len(r) == arguments.tokens]
    queries, responses = ([rows[i] for i in whole] for rows in (drawn.queries, drawn.responses))
    promised = potentials(drawn, tokenizer, reward, 1)
    scores = reward(drawn.texts).numpy()[whole]
    so_far = np.stack([promised[i].numpy() for i in whole])
    hidden = np.stack([states(reference, q, r) for q, r in zip(queries, responses, strict=True)])
    told = np.array(whole) // arguments.responses % 4 == 0
    variance = scores[told].var()
    print(f"variance {variance:.2f}, of {told.sum()} responses")
    print("tokens  as it is  line  hidden states  continuations")
    for tokens in range(0, arguments.tokens, 2):
        left = [
            (scores - so_far[:, tokens])[told].var(),
            residual(so_far[:, [tokens]], scores, told, 1.0),
            min(residual(hidden[:, tokens], scores, told, ridge) for ridge in RIDGES),
        ]
        some = np.flatnonzero(told)[: arguments.continued]
        begun = [
            torch.cat([queries[i], responses[i][:tokens]])
            for i in some
            for _ in range(arguments.continuations)
        ]
        ends = reward(draw(begun, arguments.tokens - tokens, 1 + tokens).texts).numpy()
        left.append(ends.reshape(len(some), -1).var(axis=1, ddof=1).mean())
        print(f"{tokens:6d}" + "".join(f"  {value / variance:.2f}" for value in left), flush=True)


@torch.no_grad()
def states(reference: object, query: torch.Tensor, response: torch.Tensor) -> np.ndarray:
    """Last hidden states (R, H) of the tokens before each response token."""
    model = reference.pretrained_model  # type: ignore[attr-defined]
    ids = torch.cat([query, response]).unsqueeze(0)
    last = model(ids, output_hidden_states=True).hidden_states[-1][0]
    found: np.ndarray = last[len(query) - 1 : -1].numpy()
    return found


def residual(features: np.ndarray, scores: np.ndarray, told: np.ndarray, ridge: float) -> float:
    """Mean squared error on `told` of a ridge regression fitted on the others."""
    known = features[~told]
    scaled = (features - known.mean(0)) / (known.std(0) + 1e-6)
    x, mean = scaled[~told], scores[~told].mean()
    weights = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ (scores[~told] - mean))
    return float(((scores - mean - scaled @ weights)[told] ** 2).mean())


if __name__ == "__main__":
    main()
