"""How the optimizer moves the weights: after the backward pass, or weight by weight within it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from ppo_cli.ppo.config import PPOConfig
from ppo_cli.tying import GradientPieces, gradient_in_pieces

LARGE_GRADIENTS = 2**27  # bytes


@dataclass(frozen=True)
class OptimizerStep:
    """Lets the optimizer step once the gradients are there, unless the step is cancelled.

    Attributes:
        policy: the model, as `accelerator` prepared it.
        optimizer: likewise.
        accelerator: scales, synchronises and clips gradients.
        config: `max_grad_norm` and `gradient_accumulation_steps` are read.
    """

    policy: Any
    optimizer: Any
    accelerator: Accelerator
    config: PPOConfig

    @property
    def is_within_backward(self) -> bool:
        """Whether each weight moves as soon as its gradient is there, which is then let go.

        That saves the memory of all gradients. It needs a step that no other gradient has a say in
        (no clipping, no accumulation, one process), and costs a little time a tensor, so it is for
        models of some size alone.
        """
        return (
            self.config.max_grad_norm is None
            and self.config.gradient_accumulation_steps == 1
            and self.accelerator.distributed_type == DistributedType.NO
            and self._reads_condition
            and self._gradient_bytes >= LARGE_GRADIENTS
        )

    def make_state(self) -> None:
        """Make Adam's moments now, side by side, before there are activations.

        Made in the first backward pass, as the optimizer would, they lie among activations that
        are let go one by one, and the holes fit little else.
        """
        if not (self.is_within_backward and self._is_adam):
            return
        nothing_moves = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        for group in self._inner.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and not self._inner.state.get(parameter):
                    parameter.grad = parameter.new_zeros(()).expand_as(parameter)
                    self._move(self._inner, unless=nothing_moves)
                    parameter.grad = None

    def after_backward(self, *, unless: Tensor) -> None:
        """Clip the gradients, if that is configured, and step.

        Args:
            unless: scalar bool on the device: whether the step is cancelled.
        """
        if self.config.max_grad_norm is not None:
            parameters = self.policy.parameters()
            self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
        self._move(self.optimizer, unless=unless)

    @contextmanager
    def within_backward(self, *, unless: Tensor) -> Iterator[None]:
        """A backward pass inside steps; one weight at a time has a gradient.

        Arguments as in `after_backward`. Adam takes the gradient of tied embeddings, by far the
        largest, in pieces.
        """

        def move(parameter: Tensor) -> None:
            if parameter.grad is not None:  # else it moved in pieces
                self._move(self.optimizer, unless=unless)
                parameter.grad = None

        hooks = [
            parameter.register_post_accumulate_grad_hook(move)
            for parameter in self.policy.parameters()
            if parameter.requires_grad
        ]
        by_rows = partial(self._move_rows, unless=unless) if self._is_adam else None
        try:
            with gradient_in_pieces(by_rows):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _move(self, optimizer: Any, *, unless: Tensor) -> None:
        """Let an optimizer step.

        A fused one reads the condition on its device, as it does for a gradient scaler.
        """
        if self._reads_condition:
            self._inner.found_inf = unless.float()
            optimizer.step()
            del self._inner.found_inf
        elif not unless:
            optimizer.step()

    def _move_rows(self, weight: Tensor, pieces: GradientPieces, *, unless: Tensor) -> None:
        """Let Adam step on one weight whose gradient comes in pieces of rows."""
        groups = self._inner.param_groups
        group = next((g for g in groups if any(p is weight for p in g["params"])), None)
        if group is None:  # it is none of those that the optimizer moves
            return
        state = self._inner.state[weight]
        of_rows = copy.copy(self._inner)
        of_rows.found_inf = unless.float()
        count = state["step"]
        for rows, gradient in pieces:
            part = weight.detach()[rows]
            part.grad = gradient
            moments = {k: value[rows] for k, value in state.items() if k != "step"}
            of_rows.param_groups = [{**group, "params": [part]}]
            of_rows.state = {part: {"step": count.clone(), **moments}}
            of_rows.step()
            state["step"] = of_rows.state[part]["step"]

    @property
    def _is_adam(self) -> bool:
        """Whether each number moves by its own gradient and moments, which begin at nothing."""
        return self._reads_condition and type(self._inner) in (torch.optim.Adam, torch.optim.AdamW)

    @property
    def _reads_condition(self) -> bool:
        """Whether the optimizer can be told on its device not to move."""
        return self.accelerator.scaler is None and bool(self._inner.defaults.get("fused"))

    @property
    def _inner(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @cached_property
    def _gradient_bytes(self) -> int:
        parameters = self.policy.parameters()
        return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
