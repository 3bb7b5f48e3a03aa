"""Aligning a language model, at a size that two cores train in minutes."""
