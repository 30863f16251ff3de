"""Tokens: tokenizers, chat templates, and the meter that counts what is sent."""
