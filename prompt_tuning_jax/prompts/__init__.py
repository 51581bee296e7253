"""Prompts: what is trained. They know shapes, but no network."""
