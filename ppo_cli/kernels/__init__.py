"""Fast paths: code that is there for speed or memory alone.

`switch.py` turns each of them on or off.
"""
