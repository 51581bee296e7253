"""Optimizers with the papers' settings. They see the trainable leaves and nothing else."""

import optax


def adafactor(learning_rate: float | optax.Schedule = 0.3, decay_rate: float = 0.8,
              weight_decay_rate: float | None = 1e-5, multiply_by_parameter_scale: bool = False,
              clipping_threshold: float = 1.0) -> optax.GradientTransformation:
  """Adafactor as Lester et al. 2021 (section 3.1) train prompts: constant rate, no scaling.

  Equals T5X's Adafactor. Tables with an axis shorter than 128 keep a full second moment.
  """
  return optax.adafactor(
      learning_rate, decay_rate=decay_rate, weight_decay_rate=weight_decay_rate,
      multiply_by_parameter_scale=multiply_by_parameter_scale,
      clipping_threshold=clipping_threshold)


def adamw(learning_rate: float | optax.Schedule = 1e-4, b1: float = 0.9, b2: float = 0.999,
          weight_decay: float = 0.0, max_norm: float = 1.0) -> optax.GradientTransformation:
  """AdamW after clipping the global norm of the gradients to `max_norm`."""
  return optax.chain(optax.clip_by_global_norm(max_norm),
                     optax.adamw(learning_rate, b1, b2, weight_decay=weight_decay))


def linear_decay(peak: float, steps: int, warmup_steps: int = 0) -> optax.Schedule:
  """Learning rate that rises linearly to `peak`, then falls linearly to 0 at `steps`.

  Without steps it is 0. Raises ValueError where no step is left behind the warmup.
  """
  if not steps:
    return optax.constant_schedule(0.0)
  if steps <= warmup_steps:
    raise ValueError(f'steps ({steps}) must be more than warmup_steps ({warmup_steps}).')
  return optax.join_schedules(
      [optax.linear_schedule(0.0, peak, max(warmup_steps, 1)),
       optax.linear_schedule(peak, 0.0, steps - warmup_steps)], [warmup_steps])
