"""Harm and money: the paired gate on a task, and the cost with provider caches."""
