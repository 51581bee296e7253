"""T5X folders: a real tiny one loads and computes T5X's logits; write∘load is bit-equal."""

import http.server
import json
import os
import shutil
import threading
import urllib.parse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import t5x_legacy
from prompt_tuning_jax.checkpoints.base_checkpoint import load_base
from prompt_tuning_jax.networks import parameters, t5

# The dimensions of T5X's tiny test model.
TINY = t5.T5Config(32128, 4, 2, 2, 2, 2, 8, relative_attention_num_buckets=4,
                   relative_attention_max_distance=8)
SMALL = t5.T5Config(40, 4, 2, 1, 2, 2, 8)


def random_params(config, dtype='float32', seed=0):
  rng = np.random.default_rng(seed)
  return param_paths.unflatten({
      path: jnp.asarray(rng.normal(size=spec.shape), dtype)
      for path, spec in parameters.parameter_specs(config).items()})


def assert_bit_equal(a, b):
  a, b = param_paths.flatten(a), param_paths.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    assert a[path].dtype == b[path].dtype
    assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


@pytest.fixture
def tiny(test_assets):
  return test_assets / 'prompt_tuning/test_data/test_t5_1_1_tiny/checkpoint_3'


def test_real_checkpoint_gives_t5x_logits(test_assets, tiny):
  golden = np.load(test_assets / 'golden/t5x_tiny_logits.npz', allow_pickle=False)
  base = load_base(tiny, config=TINY)
  encoded, logits = jax.jit(lambda params, *tokens: (
      t5.Transformer(TINY).apply({'params': params}, tokens[0], enable_dropout=False,
                                 method='encode'),
      t5.Transformer(TINY).apply({'params': params}, *tokens, enable_dropout=False)))(
          base.params, *(golden[f'{name}_tokens'] for name in (
              'encoder_input', 'decoder_input', 'decoder_target')))
  live = golden['encoder_input_tokens'] > 0
  np.testing.assert_allclose(encoded[live], golden['encoded'][live], atol=1e-5, rtol=1e-5)
  live = golden['decoder_loss_weights'] > 0
  np.testing.assert_allclose(logits[live], golden['logits'][live], atol=1e-4, rtol=1e-4)


def test_network_is_told_from_the_shapes(tiny):
  base = load_base(tiny)
  assert base.config == t5.T5Config(32128, 4, 2, 2, 2, 2, 8, relative_attention_num_buckets=4)
  assert base.name == 'test_t5_1_1_tiny/checkpoint_3' and base.vocabulary is None
  for config in (SMALL, t5.T5Config(40, 4, 1, 2, 1, 3, 8, ('relu',), logits_via_embedding=True)):
    stored = {path: t5x_legacy.StoredLeaf(path, spec.shape, 'float32', lambda index: None)
              for path, spec in parameters.parameter_specs(config).items()}
    assert t5x_legacy.infer_config(stored, 'here') == config


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_load_of_write_is_bit_equal(tmp_path, dtype):
  params = random_params(SMALL, dtype)
  t5x_legacy.write(tmp_path / 'new' / 'checkpoint_7', params, step=7)
  base = load_base(tmp_path / 'new' / 'checkpoint_7', dtype=None)
  assert base.config == SMALL
  assert_bit_equal(base.params, params)
  assert os.listdir(tmp_path / 'new') == ['checkpoint_7']
  t5x_legacy.write(tmp_path / 'again', base.params)
  assert_bit_equal(load_base(tmp_path / 'again', dtype=dtype).params, params)


def test_real_checkpoint_written_again_has_the_same_index(tiny, tmp_path):
  base = load_base(tiny, dtype=None)
  t5x_legacy.write(tmp_path / 'copy', base.params, step=3)
  ours, theirs = (serialization.msgpack_restore((folder / 'checkpoint').read_bytes())
                  for folder in (tmp_path / 'copy', tiny))
  assert ours['version'] == theirs['version']
  assert ours['optimizer']['state']['step'] == theirs['optimizer']['state']['step']
  ours, theirs = (param_paths.flatten(content['optimizer']['target'])
                  for content in (ours, theirs))
  for path in theirs.keys() | ours.keys():
    if not path.split('/')[-2] == 'metadata':  # chunks are the writer's choice
      np.testing.assert_array_equal(ours[path], theirs[path])
  assert_bit_equal(load_base(tmp_path / 'copy', dtype=None).params, base.params)


def test_several_chunks_and_slices(tmp_path, monkeypatch):
  monkeypatch.setattr(t5x_legacy, 'CHUNK_BYTES', 64)
  params = random_params(SMALL)
  t5x_legacy.write(tmp_path / 'x', params)
  name = 'target.token_embedder.embedding'
  assert len(os.listdir(tmp_path / 'x' / name)) == 1 + 10
  leaf = t5x_legacy.open_folder(tmp_path / 'x')['token_embedder/embedding']
  np.testing.assert_array_equal(leaf.read((slice(3, 21), slice(1, 3))),
                                params['token_embedder']['embedding'][3:21, 1:3])
  # A chunk that is gone would read as zeros.
  (tmp_path / 'x' / name / '4.0').unlink()
  with pytest.raises(ValueError, match='Unreadable: token_embedder/embedding: .*missing'):
    load_base(tmp_path / 'x')


def test_all_damaged_leaves_are_named_at_once(tmp_path):
  params = random_params(SMALL)
  folder = tmp_path / 'x'
  t5x_legacy.write(folder, params)
  chunk = folder / 'target.encoder.layers_0.mlp.wo.kernel' / '0.0'
  chunk.write_bytes(chunk.read_bytes()[:-9])
  shutil.rmtree(folder / 'target.encoder.layers_0.mlp.wi_0.kernel')
  with pytest.raises(ValueError) as error:
    load_base(folder)
  text = str(error.value)
  assert 'wo/kernel' in text and 'wi_0/kernel' in text and 'wi_1' not in text
  assert '\n' not in text and len(text) < 700 and 'tensorstore_spec' not in text


def test_missing_extra_and_misshaped_leaves_are_named_at_once(tmp_path):
  flat = param_paths.flatten(random_params(SMALL))
  del flat['decoder/layers_1/mlp/wo/kernel'], flat['encoder/encoder_norm/scale']
  flat['encoder/layers_0/attention/query/bias'] = np.zeros(4, np.float32)
  flat['decoder/logits_dense/kernel'] = np.zeros((4, 41), np.float32)
  flat['decoder/decoder_norm/scale'] = np.zeros(4, np.int32)
  t5x_legacy.write(tmp_path / 'x', param_paths.unflatten(flat))
  with pytest.raises(ValueError) as error:
    load_base(tmp_path / 'x', config=SMALL)
  text = str(error.value)
  assert 'Missing: decoder/layers_1/mlp/wo/kernel, encoder/encoder_norm/scale;' in text
  assert 'extra: encoder/layers_0/attention/query/bias;' in text
  assert 'wrong shape: decoder/logits_dense/kernel is [4, 41], expected [4, 40];' in text
  assert 'unreadable: decoder/decoder_norm/scale: its dtype is int32.' in text


@pytest.mark.parametrize('content', [
    b'', b'\x81', b'not msgpack at all', serialization.msgpack_serialize({'target': {}}),
    serialization.msgpack_serialize({'optimizer': 3})])
def test_a_file_that_is_no_legacy_index_is_one_line(tmp_path, content):
  (tmp_path / 'checkpoint').write_bytes(content)
  with pytest.raises(ValueError, match='checkpoint') as error:
    load_base(tmp_path)
  assert '\n' not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_path_in_the_index_cannot_lead_out_of_the_folder(tmp_path):
  params = random_params(SMALL)
  t5x_legacy.write(tmp_path / 'x', params)
  index = serialization.msgpack_restore((tmp_path / 'x/checkpoint').read_bytes())
  del index['sha256'], index['checksums']  # T5X's own have none.
  embedding = index['optimizer']['target']['token_embedder']['embedding']
  embedding['kvstore']['path'] = '/somewhere/else/target.token_embedder.embedding'
  (tmp_path / 'x/checkpoint').write_bytes(serialization.msgpack_serialize(index))
  assert_bit_equal(load_base(tmp_path / 'x').params, params)
  embedding['kvstore']['path'] = '..'
  (tmp_path / 'x/checkpoint').write_bytes(serialization.msgpack_serialize(index))
  with pytest.raises(ValueError, match='nreadable: token_embedder/embedding'):
    load_base(tmp_path / 'x', config=SMALL)


def test_write_refuses_an_existing_folder_and_leaves_nothing_after_an_error(tmp_path):
  params = random_params(SMALL)
  t5x_legacy.write(tmp_path / 'x', params)
  with pytest.raises(ValueError, match='exists already'):
    t5x_legacy.write(tmp_path / 'x', params)
  with pytest.raises(ValueError, match='not supported'):
    t5x_legacy.write(tmp_path / 'y', {'a': np.ones((2, 2)), 'b': None})
  assert os.listdir(tmp_path) == ['x']


class FakeStorage(http.server.BaseHTTPRequestHandler):
  """As much of Google Cloud Storage's JSON API as reading and writing objects takes."""

  objects: dict[str, bytes] = {}

  def log_message(self, *args):
    pass

  def reply(self, body: bytes, status: int = 200, **headers: str):
    self.send_response(status)
    for name, value in {'Content-Length': str(len(body)), **headers}.items():
      self.send_header(name.replace('_', '-'), value)
    self.end_headers()
    self.wfile.write(body)

  def reply_json(self, value):
    self.reply(json.dumps(value).encode(), Content_Type='application/json')

  def describe(self, name: str):
    return {'name': name, 'generation': '1', 'size': str(len(self.objects[name])),
            'updated': '2024-01-01T00:00:00Z', 'timeCreated': '2024-01-01T00:00:00Z'}

  def do_GET(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    _, is_object, name = url.path.partition('/b/bucket/o/')
    name = urllib.parse.unquote(name)
    if not is_object:  # a listing
      start, end = query.get('startOffset', ''), query.get('endOffset')
      self.reply_json({'items': [self.describe(name) for name in sorted(self.objects)
                                 if start <= name and (end is None or name < end)]})
    elif name not in self.objects:
      self.reply(b'{}', 404)
    else:
      self.reply(self.objects[name], **{'X_Goog_Generation': '1'})

  def do_POST(self):
    query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
    self.objects[query['name']] = self.rfile.read(int(self.headers['Content-Length']))
    self.reply_json(self.describe(query['name']))


@pytest.fixture
def storage(monkeypatch):
  monkeypatch.setattr(FakeStorage, 'objects', {})
  with http.server.ThreadingHTTPServer(('localhost', 0), FakeStorage) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('TENSORSTORE_GCS_HTTP_URL', f'http://localhost:{server.server_port}')
    monkeypatch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'token')
    yield FakeStorage.objects
    server.shutdown()


def test_google_storage_write_and_load(storage, tmp_path):
  params = random_params(SMALL, 'bfloat16')
  t5x_legacy.write('gs://bucket/models/small/checkpoint_5', params, step=5)
  t5x_legacy.write(tmp_path / 'x', params, step=5)
  written = {path.relative_to(tmp_path / 'x').as_posix(): path.read_bytes()
             for path in (tmp_path / 'x').rglob('*') if path.is_file()}
  prefix = 'models/small/checkpoint_5/'
  assert {name.removeprefix(prefix): data for name, data in storage.items()} == written
  base = load_base('gs://bucket/models/small/checkpoint_5/', dtype=None)
  assert base.name == 'small/checkpoint_5' and base.vocabulary is None
  assert_bit_equal(base.params, params)
  with pytest.raises(ValueError, match='exists already'):
    t5x_legacy.write('gs://bucket/models/small/checkpoint_5', params)
  with pytest.raises(ValueError, match='Did you mean gs://bucket/models/small/checkpoint_5'):
    load_base('gs://bucket/models/small')


def test_google_storage_places_are_understood():
  assert t5x_legacy._kvstore('gs://bucket/a/b') == {
      'driver': 'gcs', 'bucket': 'bucket', 'path': 'a/b/'}
  assert t5x_legacy._kvstore('gs://bucket') == {'driver': 'gcs', 'bucket': 'bucket', 'path': ''}


def kernels(folder):
  return sorted(path for path in folder.glob('target.*') if path.name.endswith('kernel'))


@pytest.mark.parametrize('key, value', [('dtype', '>f4'), ('dtype', '<i4'), ('order', 'F'),
                                        ('chunks', [2 ** 30, 2 ** 30]), ('compressor', None)])
def test_a_zarr_array_must_be_what_the_index_says(tmp_path, key, value):
  t5x_legacy.write(tmp_path / 'x', random_params(SMALL))
  path = kernels(tmp_path / 'x')[0] / '.zarray'
  path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
  with pytest.raises(ValueError, match='nreadable: decoder/.*kernel: .*') as error:
    load_base(tmp_path / 'x', config=SMALL)
  assert key in str(error.value) and '\n' not in str(error.value)


def test_a_flipped_bit_of_a_chunk_is_found_by_gzip(tmp_path):
  t5x_legacy.write(tmp_path / 'x', random_params(SMALL))
  path = kernels(tmp_path / 'x')[0] / '0.0'
  content = path.read_bytes()
  for at in range(10, len(content)):  # behind gzip's header
    path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1:])
    with pytest.raises(ValueError, match='nreadable: decoder/'):
      load_base(tmp_path / 'x', config=SMALL)


def test_arrays_in_each_others_place_are_told(tmp_path):
  t5x_legacy.write(tmp_path / 'x', random_params(SMALL))
  names = ('key', 'query')
  one, two = (tmp_path / f'x/target.encoder.layers_0.attention.{name}.kernel/0.0' for name in names)
  contents = one.read_bytes(), two.read_bytes()
  one.write_bytes(contents[1])
  two.write_bytes(contents[0])
  with pytest.raises(ValueError) as error:
    load_base(tmp_path / 'x', config=SMALL)
  for name in names:
    assert f'encoder/layers_0/attention/{name}/kernel: the bytes in target.' in str(error.value)


def changed(folder, change, is_ours: bool):
  """Changes the index as T5X would have written it, or keeping our checksums."""
  index = serialization.msgpack_restore((folder / 'checkpoint').read_bytes())
  change(index['optimizer']['target'])
  if not is_ours:
    del index['sha256'], index['checksums']
  (folder / 'checkpoint').write_bytes(serialization.msgpack_serialize(index))


@pytest.mark.parametrize('shape, chunks', [
    ([2 ** 40, 4], [1, 4]), ([2 ** 40, 4], [2 ** 40, 4]), ([40, 4], [2 ** 40, 4]),
    ([2 ** 62, 2 ** 62], [1, 1]), ([40, 4], [0, 4]), ([40, 4], [40])])
def test_impossible_sizes_end_no_process(tmp_path, shape, chunks):
  t5x_legacy.write(tmp_path / 'x', random_params(SMALL))

  def change(target):
    target['token_embedder']['embedding']['metadata'] |= {'shape': shape, 'chunks': chunks}

  changed(tmp_path / 'x', change, is_ours=False)
  with pytest.raises(ValueError) as error:
    load_base(tmp_path / 'x')
  assert '\n' not in str(error.value)


def test_a_changed_index_is_told_and_one_of_t5x_has_no_checksums(tmp_path):
  params = random_params(SMALL)
  t5x_legacy.write(tmp_path / 'x', params)

  def change(target):
    target['decoder']['decoder_norm']['scale'] = np.zeros(4, np.float32)

  changed(tmp_path / 'x', change, is_ours=True)
  with pytest.raises(ValueError, match='checkpoint: it is not what was written'):
    load_base(tmp_path / 'x')
  changed(tmp_path / 'x', lambda target: None, is_ours=False)
  assert not load_base(tmp_path / 'x').params['decoder']['decoder_norm']['scale'].any()
