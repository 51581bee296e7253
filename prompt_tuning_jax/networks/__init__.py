"""Networks: arrays in, arrays out. They know neither how prompts train nor data."""
