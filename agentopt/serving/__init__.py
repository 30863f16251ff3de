"""The hosted endpoint: an engine under supervision, and a gateway with keys, metrics, tuned programs and capture."""
