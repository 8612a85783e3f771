"""The forget request: what is forgotten now, what was forgotten before, and what the rater is asked for it."""
