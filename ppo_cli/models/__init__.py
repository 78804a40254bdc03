"""The policy, its reference, and sampling from them."""
