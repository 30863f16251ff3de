"""Training a capsulator: policies, rewards, updates, and what a training leaves behind."""
