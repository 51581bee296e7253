"""The accelerator benchmark, on the CPU: its shapes, what it counts, and XXL within 24 GB."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from prompt_tuning_jax import launch
from prompt_tuning_jax.networks import t5

FILE = pathlib.Path(__file__).resolve().parents[2] / 'benchmarks' / 'accelerator.py'
_spec = importlib.util.spec_from_file_location('accelerator', FILE)
accelerator = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(accelerator)

TINY = t5.T5Config(vocab_size=64, emb_dim=16, num_heads=2, num_encoder_layers=3,
                   num_decoder_layers=3, head_dim=8, mlp_dim=24)
SMALL_SHAPES = ['--batch_size=2', '--input_length=12', '--prompt_length=4', '--target_length=6']


@pytest.fixture
def tiny(monkeypatch):
  monkeypatch.setattr(launch, 'network_named', lambda name: TINY)


@pytest.fixture
def no_accelerator(monkeypatch):
  """For processes of a test."""
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')


@pytest.mark.slow
def test_what_is_timed_is_a_step(no_accelerator, tmp_path, capsys):
  """All but the chip's peak and PEFT on a GPU, which are told to be unknown."""
  output = tmp_path / 'result.json'
  accelerator.main(['--sizes', 'small', '--at_once', '--parameter_dtype=int8', '--repeats=2',
                    f'--output={output}', *SMALL_SHAPES])
  found = json.loads(output.read_text('utf-8'))['small']
  assert found['parameter_dtype'] == 'int8' and np.isfinite(found['loss'])
  assert len(found['seconds']['ours']) == 2 and found['medians']['ours'] > 0
  assert found['peft']['without'] and found['times_as_fast_as_peft'] is None
  assert found['memory']['total'] > found['memory']['arguments_and_outputs'] > 0
  assert found['model_flops'] > found['attention_flops'] > 0 and found['weight_bytes'] > 0
  assert capsys.readouterr().out.splitlines()[1].split()[:3] == ['small', 'int8', 'xla']


def test_a_side_that_fails_is_told_and_others_are_kept(monkeypatch, tmp_path, capsys):
  """Base's own side dies, and PEFT's of small: the rest is timed and written all the same."""
  known = {'parameter_dtype': 'int8', 'attention': 'cudnn', 'device': 'NVIDIA H200',
           'model_flops': 1e12, 'attention_flops': 0, 'weight_bytes': 0, 'memory': {'total': 1}}

  class Apart:
    def __init__(self, script, *argv):
      self.flags = accelerator.parser().parse_args(argv)

    def __enter__(self):
      return self

    def __exit__(self, *error):
      pass

    def turn(self):
      if (self.flags.alone, self.flags.side) != ('small', 'ours'):
        raise SystemExit('it failed (1): see above.')
      pathlib.Path(self.flags.output).write_text(json.dumps(known), 'utf-8')
      return {'seconds': 0.5, 'processor_seconds': 0.5}

  monkeypatch.setattr(accelerator.turns, 'Apart', Apart)
  output = tmp_path / 'result.json'
  with pytest.raises(SystemExit, match='^base failed: see above.$'):
    accelerator.main(['--sizes', 'small', 'base', f'--output={output}'])
  found = json.loads(output.read_text('utf-8'))
  assert found['small']['medians'] == {'ours': 0.1}  # of five steps a turn
  assert 'failed' in found['small']['peft']['without']
  assert found['base']['without'] == 'it failed (1): see above.'
  assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ['network', 'small']


@pytest.mark.slow
def test_a_step_of_peft_can_be_taken(tiny):
  """On the CPU; compiled blocks are PyTorch's to test."""
  flags = accelerator.parser().parse_args(['--peft_compile=none', *SMALL_SHAPES])
  run, known = accelerator.peft_run('small', flags, device='cpu')
  run()
  assert known['compiled'] == 'none' and known['peft']


def test_what_the_roof_is_of(tiny):
  """Rows, layers, products, FLOPs of a product and its width; a byte of each weight, twice."""
  flags = accelerator.parser().parse_args(SMALL_SHAPES)
  pairs = 16 * 16 + 6 * 6 + 6 * 16
  assert accelerator.attention_flops(TINY, flags) == 2 * 3 * (2 + 4) * 2 * 16 * pairs
  _, shapes = accelerator.step_and_shapes(TINY, 'int8', flags)
  kernels = 3 * (4 + 8) * 16 * 16 + 6 * 3 * 16 * 24 + 16 * 64
  assert 2 * kernels < accelerator.weight_bytes(shapes) < 3 * kernels


def test_four_flops_for_each_parameter_and_token(tiny):
  flags = accelerator.parser().parse_args(SMALL_SHAPES)
  attention, mlp = 4 * 16 * 16, 3 * 16 * 24
  of_inputs = 3 * (attention + mlp) + 3 * attention / 2
  of_targets = 3 * (attention + attention / 2 + mlp) + 16 * 64
  assert accelerator.model_flops(TINY, flags) == 4 * 2 * (16 * of_inputs + 6 * of_targets)


def test_a_result_is_held_against_the_chip():
  known = {'model_flops': 4e12, 'attention_flops': 1e12, 'weight_bytes': 1e9}
  found = accelerator.against(accelerator.peaks('NVIDIA H200'), known,
                              {'ours': 0.01, 'peft': 0.02})
  assert found['mfu'] == pytest.approx(4e12 / 0.01 / 989e12)
  assert found['roof_seconds'] == pytest.approx(5e12 / 989e12) and found['roof'] == 'FLOPs'
  assert found['times_as_fast_as_peft'] == 2
  assert accelerator.peaks('TPU v5 lite')[0] == 197e12 and accelerator.peaks('TPU v5p')[0] == 459e12
  assert accelerator.peaks('cpu') is None


@pytest.mark.slow
@pytest.mark.parametrize('size', ['small', 'base', 'large', 'xl'])
def test_every_size_is_lowered_for_accelerators(size, monkeypatch):
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  flags = accelerator.parser().parse_args([])
  found = accelerator.dry_run(size, flags, {'cuda': 'cudnn', 'tpu': 'pallas'})
  assert found['cuda']['bytes_of_program'] > 0 < found['tpu']['bytes_of_program']
  assert found['argument_bytes'] == pytest.approx(2 * found['parameters'], rel=0.02)


@pytest.mark.slow
def test_xxl_trains_a_prompt_within_24_gb(monkeypatch):
  """11 billion parameters, 8 rows of 512 + 100 and 32 tokens: lowered, and compiled for the CPU,
  which takes more memory than an accelerator as it computes bfloat16 in float32."""
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  flags = accelerator.parser().parse_args(['--compile'])
  found = accelerator.dry_run('xxl', flags, {'cuda': 'cudnn', 'tpu': 'pallas'})
  assert found['parameters'] > 11e9
  assert found['compiled']['memory']['total'] <= 24e9
