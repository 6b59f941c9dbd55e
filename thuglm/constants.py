"""Numbers that texts and tokens share with the model, for whoever does not need the model itself."""

IGNORE_INDEX = -100
"""Label of a place that is no target."""

MAX_LENGTH = 2048
"""Tokens of the longest sequence that the published model was trained for."""
