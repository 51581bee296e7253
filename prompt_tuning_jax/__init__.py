"""Soft prompts for T5 in JAX: train, evaluate and serve prompts of a frozen model.

Importing the package loads nothing heavy: no JAX, no TensorFlow.
"""

__version__ = '0.1.0'
