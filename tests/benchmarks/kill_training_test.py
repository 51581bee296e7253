"""Runs that are killed end as those that are not: the benchmark in little."""

import importlib.util
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'benchmarks'
_spec = importlib.util.spec_from_file_location('kill_training', FOLDER / 'kill_training.py')
kill_training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kill_training)


@pytest.mark.slow
def test_killed_runs_end_byte_for_byte_as_an_undisturbed_one(tmp_path):
  kill_training.write_base(tmp_path)
  result = kill_training.kill(tmp_path, kills=6, steps=300, seed=1)
  assert result['kills'] == 6 and result['bit_equal'] == result['runs_to_the_end'] >= 1
  assert len(result['by_moment']) > 2


@pytest.mark.slow
def test_memory_and_open_files_stay_as_they_are(tmp_path):
  kill_training.write_base(tmp_path)
  result = kill_training.long_run(tmp_path, steps=3000)
  assert result['saves'] == 150 and len(result['on_the_way']) > 3
  assert result['open_files_grown'] <= 4
  # tensorstore 0.1.86 keeps some 20 kB of every save (experimental_collect_matching_metrics).
  assert result['kilobytes_grown_per_save'] < 100
