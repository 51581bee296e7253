"""Training: the trainer's state, its step, its loop, and what the loop reports and evaluates."""
