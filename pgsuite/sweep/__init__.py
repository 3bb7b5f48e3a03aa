"""Searches for settings, and populations that change them while they train."""
