"""Everything that is there for speed alone."""
