"""speed.py: every benchmark is there and knows its flags; their figures become lines of a table."""

import importlib.util
import json
import math
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'benchmarks'
_spec = importlib.util.spec_from_file_location('speed', FOLDER / 'speed.py')
speed = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(speed)

WRITES = """
import json, sys
output = sys.argv[-1].removeprefix('--output=')
json.dump({'results': [{'network': 'n', 'batching': 'b', 'ratio': %s,
                        'median_seconds': {'batch': 1, 'step': 2}}]}, open(output, 'w'))
"""


@pytest.mark.parametrize('name', speed.BENCHMARKS)
def test_a_benchmark_is_there_and_has_its_flags(name):
  path = FOLDER / f'{name}.py'
  if not path.exists():
    pytest.skip(f'{path.name} is not there.')
  script = path.read_text('utf-8')
  benchmark = speed.BENCHMARKS[name]
  for flag in ('--output', *benchmark.flags, *benchmark.quick):
    assert f"'{flag.split('=')[0]}'" in script, flag


@pytest.mark.parametrize('name', speed.BENCHMARKS)
def test_what_was_measured_becomes_lines(name):
  found = json.loads((FOLDER / 'speed.json').read_text('utf-8'))['benchmarks'][name]
  lines = list(speed.BENCHMARKS[name].lines(found))
  assert lines and len({line.name for line in lines}) > len(lines) / 3
  for line in lines:
    assert line.ours > 0 and line.peer > 0
    assert math.isclose(line.ratio, line.ours / line.peer) or math.isclose(
        line.ratio, line.peer / line.ours), line
  text = speed.table(lines, ['other'])
  assert text.count('\n') == len(lines) + 2 and 'FAILED' in text.splitlines()[-1]


@pytest.mark.parametrize(('ratio', 'holds'), [(2, 'yes'), (0.5, 'NO')])
def test_the_table_says_what_holds_and_what_failed(
    tmp_path, monkeypatch, capfd, ratio, holds):
  (tmp_path / 'host_pipeline.py').write_text(WRITES % ratio)
  (tmp_path / 'kept_state.py').write_text('raise SystemExit(3)')
  monkeypatch.setattr(speed, 'HERE', tmp_path)
  monkeypatch.setattr('sys.argv', ['speed.py', '--only', 'host_pipeline', 'kept_state',
                                   f'--output={tmp_path / "speed.json"}'])
  assert speed.main() == 1
  *_, line, failed = capfd.readouterr().out.splitlines()
  assert line == f'| n, b: batch, step | 1 | 2 | {ratio:.2f} | ≥ 1 | {holds} |'
  assert failed.startswith('| kept_state |') and 'FAILED' in failed
  written = json.loads((tmp_path / 'speed.json').read_text('utf-8'))
  assert written['lines'][0]['holds'] is (holds == 'yes') and written['failed'] == ['kept_state']
  assert (tmp_path / 'speed.png').stat().st_size > 0
  # Of a file that is there, what was asked for is renewed.
  monkeypatch.setattr('sys.argv', ['speed.py', '--only', 'kept_state',
                                   f'--output={tmp_path / "speed.json"}'])
  assert speed.main() == 1
  again = json.loads((tmp_path / 'speed.json').read_text('utf-8'))
  assert again == {**written, 'load_average': again['load_average']}
  monkeypatch.setattr('sys.argv', [*sys.argv, '--quick'])
  with pytest.raises(SystemExit):  # figures of two kinds
    speed.main()
