"""Decoding: search over tokens. It knows nothing but a function that gives the next logits."""
