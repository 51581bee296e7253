"""What tests of several kinds of batches share."""

import numpy as np
import pytest


@pytest.fixture
def assert_processes_share():
  """Asserts that the rows of three processes, one after another, are the batches of one alone."""

  def check(make, steps):
    whole = make()
    parts = [make(process_index=i, process_count=3) for i in range(3)]
    for step in range(steps):
      batches = [part.batch_at(step) for part in parts]
      for key, expected in whole.batch_at(step).items():
        np.testing.assert_array_equal(np.concatenate([batch[key] for batch in batches]), expected)

  return check
