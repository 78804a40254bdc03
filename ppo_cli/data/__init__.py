"""Prompts, where they come from, and the embedded world."""
