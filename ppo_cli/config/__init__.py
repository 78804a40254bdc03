"""From YAML to validated, frozen settings; no torch."""
