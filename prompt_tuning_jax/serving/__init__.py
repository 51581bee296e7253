"""Answers over HTTP: requests, the engine that batches them, and an OpenAI-compatible app."""
