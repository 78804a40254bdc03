"""Rewards: texts in, scores out; penalties and potentials."""
