"""Anonymised releases: the data itself, changed so that it may be handed out, with counts of what was changed."""
