"""The extractive engine: which units are worth keeping, and the hard cut."""
