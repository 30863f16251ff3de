"""Texts as units, the spans in them that are protected, and the edits that lose nothing."""
