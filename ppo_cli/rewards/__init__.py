"""From texts to scores."""
