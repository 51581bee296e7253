"""Rates of a mixture, as T5 defines them, and what a mixture is made of."""

import numpy as np
import pytest

from prompt_tuning_jax.data import mixture
from prompt_tuning_jax.data.mixture import Equal, Mixture, Proportional, Temperature
from prompt_tuning_jax.data.seqio_task import SeqioTask

SIZES = (100, 10_000, 250)


def shares(rate):
  return np.array(rate(SIZES)) / sum(rate(SIZES))


def test_rates():
  np.testing.assert_allclose(Proportional()(SIZES), SIZES)
  np.testing.assert_allclose(Proportional(cap=250)(SIZES), (100, 250, 250))
  np.testing.assert_allclose(Temperature(1.0)(SIZES), SIZES)
  np.testing.assert_allclose(Temperature(2.0, cap=400)(SIZES), (10, 20, 250 ** .5))
  np.testing.assert_allclose(shares(Temperature(1e9)), shares(Equal()), rtol=1e-6)


def test_rates_are_those_of_seqio():
  seqio = pytest.importorskip('seqio')

  class Sized:  # what SeqIO asks of a task
    def __init__(self, size):
      self.name, self.cache_dir = 'sized', None
      self.num_input_examples = lambda split: size

  for ours, theirs in ((Proportional(1000), {'maximum': 1000}),
                       (Temperature(3.0, cap=5000), {'temperature': 3.0, 'maximum': 5000}),
                       (Proportional(), {})):
    expected = [seqio.mixing_rate_num_examples(Sized(size), **theirs) for size in SIZES]
    np.testing.assert_allclose(ours(SIZES), expected, rtol=1e-6)


def test_a_task_alone_is_a_mixture_of_one():
  task = SeqioTask('sst2')
  assert mixture.as_mixture(task).tasks == (task,)
  both = mixture.seqio_mixture(('sst2', 'mrpc'), Equal())
  assert mixture.as_mixture(both) is both
  assert both.name == 'sst2+mrpc' and [part.name for part in both.tasks] == ['sst2', 'mrpc']
  made = mixture.seqio_mixture(('sst2', 'mrpc'), max_examples=3, eval_split=None)
  assert {(part.max_examples, part.eval_split) for part in made.tasks} == {(3, None)}


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: Mixture([]), 'tasks of different names'),
    (lambda: mixture.seqio_mixture(('sst2', 'sst2')), 'tasks of different names'),
    (lambda: mixture.seqio_mixture('sst2'), r"such as \('sst2', 'mrpc'\), got 'sst2'"),
    (lambda: Proportional(0), 'MIXTURE_CAP should be a whole number'),
    (lambda: Proportional('abc'), 'MIXTURE_CAP should be a whole number'),
    (lambda: mixture.seqio_mixture(3), r"such as \('sst2', 'mrpc'\), got 3"),
    (lambda: mixture.seqio_mixture(('copa', 3)), 'should be a text such as'),
    (lambda: Temperature(0), 'temperature must be positive')])
def test_what_makes_no_mixture(make, message):
  with pytest.raises(ValueError, match=message):
    make()
