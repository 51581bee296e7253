"""A bucket for tests: Cloud Storage's JSON interface, over HTTP, from a dictionary.

gcsfs (through epath) and tensorstore (through orbax) speak with it as with the real one.
"""

import base64
import contextlib
import email
import hashlib
import http.server
import json
import os
import re
import threading
import urllib.parse

import pytest

# Read when gcsfs is imported: asking what kind of bucket it is needs credentials.
os.environ['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'] = 'false'

NAME = 'test-bucket'
DATE = '2026-01-01T00:00:00.000Z'
OBJECT = re.compile(rf'(?:/(upload|download))?/storage/v1/b/{NAME}/o(?:/(.*))?')


class Bucket(dict):
  """{name: bytes}. `generations` count each object's writes.

  `log` is ['METHOD name', …] of requests, and of what they do, 'WRITE name' and 'DOWNLOAD name'.
  """

  url = f'gs://{NAME}'

  def __init__(self):
    super().__init__()
    self.generations, self.uploads, self.log = {}, {}, []
    self.lock = threading.RLock()

  def write(self, name: str, content: bytes) -> dict:
    with self.lock:
      self[name] = content
      self.generations[name] = self.generations.get(name, 0) + 1
      self.log.append(f'WRITE {name}')
      return self.about(name)

  def about(self, name: str) -> dict:
    digest = hashlib.md5(self[name]).digest()
    return {'kind': 'storage#object', 'name': name, 'bucket': NAME, 'id': f'{NAME}/{name}',
            'size': str(len(self[name])), 'generation': str(self.generations[name]),
            'metageneration': '1', 'updated': DATE, 'timeCreated': DATE,
            'contentType': 'application/octet-stream', 'storageClass': 'STANDARD',
            'md5Hash': base64.b64encode(digest).decode(), 'etag': digest.hex()}


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True
  wbufsize = -1

  @property
  def bucket(self) -> Bucket:
    return self.server.bucket

  def log_message(self, *_):
    pass

  def answer(self, status: int, body: bytes | dict = b'', **headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
      self.wfile.write(body)
      self.wfile.flush()

  def do(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    with self.bucket.lock:
      if match := OBJECT.fullmatch(url.path):
        way, name = match[1], match[2] and urllib.parse.unquote(match[2])
        self.bucket.log.append(f'{self.command} {name or query}')
        if way == 'upload':
          self.upload(query, body)
        elif name:
          self.object(name, query, way == 'download')
        else:
          self.list(query)
      elif url.path == f'/storage/v1/b/{NAME}':
        self.answer(200, {'kind': 'storage#bucket', 'name': NAME, 'id': NAME})
      elif url.path.startswith('/batch'):
        self.batch(body)
      else:
        self.answer(404, {'error': {'code': 404, 'message': f'Not Found: {url.path}'}})

  do_GET = do_POST = do_PUT = do_DELETE = do

  def upload(self, query, body):
    name = query.get('name')
    if query.get('uploadType') == 'multipart':
      _, about, content, _ = body.split(self.boundary())
      name = json.loads(about.split(b'\n\n', 1)[1])['name']
      body = content.split(b'\n\n', 1)[1].removesuffix(b'\n')
    if query.get('uploadType') == 'resumable' and 'upload_id' not in query:
      address = f'http://{self.headers["Host"]}{self.path}&upload_id={len(self.bucket.log)}'
      self.bucket.uploads[address.rpartition('=')[2]] = b''
      self.answer(200, Location=address)
      return
    if upload := query.get('upload_id'):
      body = self.bucket.uploads[upload] = self.bucket.uploads[upload] + body
      if self.headers['Content-Range'].endswith('/*'):
        self.answer(308, Range=f'bytes=0-{len(body) - 1}')
        return
    held = self.bucket.generations.get(name, 0) if name in self.bucket else 0
    if query.get('ifGenerationMatch', str(held)) != str(held):
      self.answer(412, {'error': {'code': 412, 'message': 'Precondition Failed'}})
    else:
      self.answer(200, self.bucket.write(name, body))

  def boundary(self) -> bytes:
    return b'--' + re.search('boundary="?([^";]+)', self.headers['Content-Type'])[1].encode()

  def object(self, name, query, is_media):
    if copied := re.fullmatch(rf'(.*)/(?:copyTo|rewriteTo)/b/{NAME}/o/(.*)', name):
      made = self.bucket.write(copied[2], self.bucket[copied[1]])
      self.answer(200, {'done': True, 'resource': made, **made})
    elif name not in self.bucket:
      self.answer(404, {'error': {'code': 404, 'message': f'No such object: {name}'}})
    elif self.command == 'DELETE':
      del self.bucket[name]
      self.answer(204)
    elif is_media or query.get('alt') == 'media':
      self.bucket.log.append(f'DOWNLOAD {name}')
      content, status, headers = self.bucket[name], 200, {}
      if asked := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')):
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        headers = {'Content_Range': f'bytes {first}-{last}/{len(content)}'}
        content, status = content[first:last + 1], 206
      self.answer(status, content, X_Goog_Generation=str(self.bucket.generations[name]), **headers)
    else:
      self.answer(200, self.bucket.about(name))

  def list(self, query):
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    names = [name for name in sorted(self.bucket) if name.startswith(prefix)
             and query.get('startOffset', '') <= name < query.get('endOffset', '\U0010ffff')]
    folders = set()
    if delimiter:
      inner = {name: name[len(prefix):].partition(delimiter) for name in names}
      folders = {prefix + first + delimiter for first, found, _ in inner.values() if found}
      names = [name for name in names if not inner[name][1]]
    names = names[:int(query.get('maxResults', len(names)))]
    self.answer(200, {'kind': 'storage#objects', 'items': [self.bucket.about(n) for n in names],
                      'prefixes': sorted(folders)})

  def batch(self, body):
    head = f'Content-Type: {self.headers["Content-Type"]}\r\n\r\n'.encode()
    parts = []
    for part in email.message_from_bytes(head + body).get_payload():
      name = urllib.parse.unquote(re.search(r'/o/(\S+)', part.get_payload())[1].split('?')[0])
      status = 'HTTP/1.1 ' + ('204 No Content' if self.bucket.pop(name, None) is not None else
                              '404 Not Found')
      parts.append('--x\r\nContent-Type: application/http\r\nContent-ID: <response-'
                   f'{part["Content-ID"].strip("<>")}>\r\n\r\n{status}\r\n\r\n\r\n')
    self.answer(200, ''.join([*parts, '--x--']).encode(),
                Content_Type='multipart/mixed; boundary=x')


@pytest.fixture
def bucket(monkeypatch, tmp_path):
  """An empty bucket, which all of this process's gs:// paths lead to."""
  pytest.importorskip('gcsfs')
  made = Bucket()
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.bucket = made
  server.handle_error = lambda *_: None  # a client that goes away
  server.daemon_threads = True
  threading.Thread(target=server.serve_forever, daemon=True).start()
  address = f'http://127.0.0.1:{server.server_port}'
  for name, value in {
      'STORAGE_EMULATOR_HOST': address, 'TENSORSTORE_GCS_HTTP_URL': address,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'x', 'GOOGLE_CLOUD_PROJECT': 'x', 'EPATH_USE_TF': 'false',
      'PROMPT_TUNING_JAX_CACHE': str(tmp_path / 'cache')}.items():
    monkeypatch.setenv(name, value)
  import fsspec
  from etils.epath import backend, gpath
  for cached in (gpath._is_tf_installed, gpath._is_zonal_gcs_bucket,
                 type(backend.fsspec_backend)._get_filesystem):
    cached.cache_clear()
  fsspec.get_filesystem_class('gcs').clear_instance_cache()
  yield made
  server.shutdown()
  server.server_close()
