"""Reading and writing weights and prompts, one format per file."""
