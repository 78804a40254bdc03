"""The command line: each command parses its options, calls one function and prints.

The commands' modules do not use `from __future__ import annotations`: typer would then evaluate
the text of every annotation, which takes a tenth of the start.
"""
