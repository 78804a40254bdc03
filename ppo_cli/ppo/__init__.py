"""Proximal Policy Optimization for causal language models."""
