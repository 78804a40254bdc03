"""Prompts, their sources, and the embedded data and models."""
