"""How good a model is: samples, measures, comparisons."""
