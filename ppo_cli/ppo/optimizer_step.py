"""How the optimizer moves the weights: after the backward pass, or weight by weight within it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW

from ppo_cli.errors import UsageError
from ppo_cli.kernels.switch import is_enabled
from ppo_cli.kernels.tied_embeddings import GradientPieces, gradient_in_pieces
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.utils import processes

LARGE_GRADIENTS = 2**27  # bytes, from which weights move within the backward pass
BYTES_AT_ONCE = 2**22  # of gradients, collected for one partial step, as each costs some time
BYTES_AT_ONCE_ON_GPU = 2**26  # more, because the kernels of a small step end before the next launch


def make_optimizer(model: torch.nn.Module, config: PPOConfig) -> Adam:
    """Adam over the trainable parameters, fused where the device has it.

    Raises:
        UsageError: none is trainable.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UsageError("no parameter of the model trains: requires_grad is False for all of them")
    fused = {p.device.type for p in trainable} <= {"cpu", "cuda"}
    return Adam(trainable, lr=config.learning_rate, fused=fused)


def stepped_parameters(optimizer: Any) -> list[Tensor]:
    """The parameters that an optimizer holds."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def clear_other_gradients(model: torch.nn.Module, optimizer: Any) -> None:
    """Free the gradients of parameters that the optimizer does not hold; they would pile up."""
    held = set(stepped_parameters(optimizer))
    for parameter in model.parameters():
        if parameter not in held:
            parameter.grad = None


@dataclass(frozen=True)
class OptimizerStep:
    """Lets the optimizer step once the gradients are complete, unless the step is cancelled.

    Attributes:
        policy: the model, as `accelerator` prepared it.
        optimizer: the optimizer, as `accelerator` prepared it.
        accelerator: scales, synchronises and clips gradients.
        config: `max_grad_norm` and `gradient_accumulation_steps` are read.
        averages_itself: whether the gradients are still those of this process alone.
    """

    policy: Any
    optimizer: Any
    accelerator: Accelerator
    config: PPOConfig
    averages_itself: bool = False

    @property
    def is_within_backward(self) -> bool:
        """Whether each weight moves as soon as its gradient is complete, which is then freed.

        That saves the memory of the gradients. It needs a step of each weight that depends on no
        other gradient (no clipping, no accumulation, one process). It costs a little time per
        tensor, so small models do without.
        """
        return is_enabled("optimizer_in_backward") and self.reason_after_backward is None

    @property
    def reason_after_backward(self) -> str | None:
        """Why the weights have to move after the backward pass; None where they need not."""
        if self.config.max_grad_norm is not None:
            return "max_grad_norm needs all gradients"
        if self.config.gradient_accumulation_steps > 1:
            return "gradients are accumulated"
        if self.accelerator.distributed_type != DistributedType.NO:
            return "only for one process"
        # Others may hold more than a copy of what they share.
        if not (self._reads_condition and type(self._inner) in (Adam, AdamW, SGD, Adagrad)):
            return "not for this optimizer"
        if self._gradient_bytes < LARGE_GRADIENTS:
            return f"for gradients of {LARGE_GRADIENTS // 2**20} MiB or more"
        return None

    def make_state(self) -> None:
        """Allocate Adam's moments before there are activations.

        The optimizer would do it in the first backward pass, among activations that are freed one
        by one, and the holes between the moments would be too small for later allocations.
        """
        if not (self._on_cpu and self.is_within_backward and self._is_adam):
            return
        new = [
            parameter
            for parameter in stepped_parameters(self._inner)
            if parameter.requires_grad and not self._inner.state.get(parameter)
        ]
        for parameter in new:
            parameter.grad = parameter.new_zeros(()).expand_as(parameter)
        nothing_moves = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        _PartialStep(self._inner, nothing_moves).move(new)

    def after_backward(self, *, unless: Tensor) -> None:
        """Clip the gradients of what is stepped, if that is configured, and step.

        Args:
            unless: scalar bool on the device: whether the step is cancelled.
        """
        if self.averages_itself:
            for parameter in self.policy.parameters():
                if parameter.grad is not None:
                    parameter.grad = processes.total(parameter.grad) / processes.count()
        if self.config.max_grad_norm is not None:
            held = set(stepped_parameters(self.optimizer))
            parameters = [p for p in self.policy.parameters() if p in held]
            self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
        self._move(unless=unless)

    @contextmanager
    def within_backward(self, *, unless: Tensor) -> Iterator[None]:
        """Step during the backward pass in the block; few weights at a time have a gradient.

        Arguments as in `after_backward`. On a CPU, Adam takes the gradient of tied embeddings, the
        largest by far, in pieces.
        """
        part = _PartialStep(self._inner, unless)
        at_once = BYTES_AT_ONCE if self._on_cpu else BYTES_AT_ONCE_ON_GPU
        take = part.move_rows if self._on_cpu and self._is_adam else None
        waiting: list[Tensor] = []
        held = 0

        def gradient_is_complete(parameter: Tensor) -> None:
            nonlocal held
            if parameter.grad is None:  # taken in pieces
                return
            waiting.append(parameter)
            held += parameter.grad.nbytes
            if held >= at_once:
                part.move(waiting)
                waiting.clear()
                held = 0

        hooks = [
            parameter.register_post_accumulate_grad_hook(gradient_is_complete)
            for parameter in self.policy.parameters()
            if parameter.requires_grad
        ]
        try:
            with gradient_in_pieces(take):
                yield
        finally:
            for hook in hooks:
                hook.remove()
        self._move(unless=unless)  # the remaining weights; also runs hooks and counts the step

    def _move(self, *, unless: Tensor) -> None:
        """Let the optimizer step, unless the step is cancelled.

        A fused optimizer reads the condition on its device, as it does for a gradient scaler.
        """
        if self._reads_condition:
            self._inner.found_inf = unless.float()
            self.optimizer.step()
            del self._inner.found_inf
        elif not unless:
            self.optimizer.step()

    @property
    def _on_cpu(self) -> bool:
        return self.accelerator.device.type == "cpu"

    @property
    def _is_adam(self) -> bool:
        """Whether each number moves by its own gradient and moments, which start at 0."""
        return self._reads_condition and type(self._inner) in (Adam, AdamW)

    @property
    def _reads_condition(self) -> bool:
        """Whether the optimizer reads on its device that a step is cancelled."""
        return self.accelerator.scaler is None and bool(self._inner.defaults.get("fused"))

    @property
    def _inner(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @cached_property
    def _gradient_bytes(self) -> int:
        parameters = self.policy.parameters()
        return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


class _PartialStep:
    """A fused optimizer's step on some of its weights.

    Args:
        optimizer: the whole optimizer; its state is shared.
        unless: as in `OptimizerStep.after_backward`.
    """

    def __init__(self, optimizer: Any, unless: Tensor) -> None:
        self._groups = optimizer.param_groups
        self._group_of = {p: i for i, group in enumerate(self._groups) for p in group["params"]}
        self._state = optimizer.state
        # A loop over all weights for the few with a gradient would take longer than the step.
        self._optimizer = copy.copy(optimizer)
        self._optimizer.found_inf = unless.float()

    def move(self, weights: list[Tensor]) -> None:
        """Step on these weights with their gradients, which are then freed."""
        members: dict[int, list[Tensor]] = {}
        for weight in weights:
            if weight in self._group_of:
                members.setdefault(self._group_of[weight], []).append(weight)
        self._step(members, self._state)
        for weight in weights:
            weight.grad = None

    def move_rows(self, weight: Tensor, pieces: GradientPieces) -> None:
        """Let Adam step on one weight whose gradient comes in pieces of rows."""
        if weight not in self._group_of:
            return
        state = self._state[weight]
        count = state["step"]
        for rows, gradient in pieces:
            part = weight.detach()[rows]
            part.grad = gradient
            moments = {key: value[rows] for key, value in state.items() if key != "step"}
            of_part = {"step": count.clone(), **moments}
            self._step({self._group_of[weight]: [part]}, {part: of_part})
            state["step"] = of_part["step"]

    def _step(self, members: dict[int, list[Tensor]], state: Any) -> None:
        self._optimizer.param_groups = [
            {**self._groups[i], "params": weights} for i, weights in members.items()
        ]
        self._optimizer.state = state
        self._optimizer.step()
