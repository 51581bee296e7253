"""Type aliases, and the letters that shapes and einsums are written in.

  B batch          T input positions     S key positions     P prompt length
  L layer          N heads               H head dimension    D model dimension
  F mlp dimension  V embedding rows      K prompts           R rows of a prompt bank
  C candidates
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray
Batch = Mapping[str, Array]
DType = Any
Initializer = Callable[..., jax.Array]
PyTree = Any
Shape = tuple[int, ...]
