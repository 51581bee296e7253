"""What trained prompts tell: how alike they are, and which words they lie near."""
