"""How a network's layers are run: settings that change time and memory, not what is computed."""

import dataclasses
from typing import Any

import jax

from prompt_tuning_jax.networks import fused_attention


@dataclasses.dataclass(frozen=True)
class Execution:
  """For small networks the defaults, for large ones gin/execution/large.gin.

  Args:
    scan_layers: layers are compiled once, whatever their number (`networks.layer_stack`).
    remat_policy: what the backward pass computes again (`layer_stack.REMAT_POLICIES`).
    attention: one of `fused_attention.IMPLEMENTATIONS`, or 'auto'.
  """

  scan_layers: bool = False
  remat_policy: str = 'none'
  attention: str = 'xla'

  def applied(self, config: Any, devices: int = 1) -> Any:
    """The configuration with these settings, but for `scan_layers`: that is its parameters' too.

    Raises ValueError for what does not fit the network, JAX's backend or so many devices.
    """
    attention = fused_attention.chosen(self.attention, config, jax.default_backend(), devices)
    return dataclasses.replace(config, remat_policy=self.remat_policy, attention=attention)
