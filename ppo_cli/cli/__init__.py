"""The command line: parse, call one function, print.

Modules of commands do without `from __future__ import annotations`: typer would evaluate every
annotation's text at each start, a tenth of it.
"""
