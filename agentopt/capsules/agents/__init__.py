"""Agents that call again and again: histories, masking, originals behind handles, the live middleware."""
