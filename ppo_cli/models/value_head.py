"""The value head: the return that a policy expects, token by token."""

from __future__ import annotations

from torch import Tensor, nn

from ppo_cli.errors import UsageError


class ValueHead(nn.Module):
    """One number per hidden state: dropout, then a linear layer kept in float32.

    Args:
        hidden_size: width H of the hidden states.
        dropout: dropout probability on the hidden states.
        init_strategy: None for torch's own initialisation of a linear layer, `"normal"` for a
            normal distribution of standard deviation `initializer_range` and a zero bias.
        initializer_range: that standard deviation.
    """

    def __init__(
        self,
        hidden_size: int,
        dropout: float = 0.1,
        init_strategy: str | None = None,
        initializer_range: float = 0.2,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.summary = nn.Linear(hidden_size, 1)
        if init_strategy == "normal":
            nn.init.normal_(self.summary.weight, std=initializer_range)
            nn.init.zeros_(self.summary.bias)
        elif init_strategy is not None:
            raise UsageError(f"v_head_init_strategy is None or 'normal', not {init_strategy!r}")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., H) -> (..., 1)."""
        return self.summary(self.dropout(hidden_states).to(self.summary.weight.dtype))
