"""Many runs: trials of a sweep, how their values are chosen, and what came of them."""
