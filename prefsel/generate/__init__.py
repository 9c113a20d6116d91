"""Prompts → new completions."""
