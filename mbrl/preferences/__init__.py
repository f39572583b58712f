"""Preferences: comparisons of segments, who gives them, which to ask for, what they taught."""
