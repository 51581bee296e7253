"""The laws of the engine: each answer is the offline one, whoever else asks, comes or goes."""

import asyncio
import dataclasses
import time

import jax
import pytest
from offline_engine import (
  DECODED,
  LABELS,
  LONGEST,
  Offline,
  check,
  prefix,
  prompt,
  random_requests,
  texts_of,
)

from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.networks.bart import BartConfig
from prompt_tuning_jax.networks.bert import BertConfig
from prompt_tuning_jax.networks.gpt import GPTConfig
from prompt_tuning_jax.prompt_bank import PromptBank
from prompt_tuning_jax.serving import engine as engine_module
from prompt_tuning_jax.serving.engine import Engine, EngineSettings
from prompt_tuning_jax.serving.prompt_folder import PromptFolder
from prompt_tuning_jax.serving.requests import (
  BadRequest,
  Classification,
  Failed,
  Finished,
  Generation,
  Labels,
  Late,
  Overloaded,
  Stopping,
  UnknownModel,
)
from prompt_tuning_jax.serving.waiting import submit_all

SETTINGS = EngineSettings((4,), (16, 32), (LABELS,), LONGEST, DECODED, chunk=5, room=16,
                          poll_seconds=0, max_queue=200)


@pytest.fixture(scope='module')
def offline(tiny_base):
  return Offline(base_checkpoint.load_base(tiny_base))


@pytest.fixture(scope='module')
def files(offline):
  base = offline.base
  return {'before': prompt(base, 3, 0, labels=['good', 'bad'], task='reviews'),
          'end': prompt(base, 7, 1, 'end'), 'infix': prompt(base, 5, 2, 'infix', labels=['a', 'b']),
          'after': prompt(base, 1, 3, 'after_first'), 'keys': prefix(base, 2, 4),
          'longer_keys': prefix(base, 4, 5)}


@pytest.fixture(scope='module')
def served(offline, files):
  """What a prepared engine serves: other engines of the tests take it over."""
  return make(offline, None, files).prepare()


def make(offline, served, files=None, folder=None, **changes) -> Engine:
  made = Engine(offline.model, offline.base.params, offline.vocabulary,
                PromptBank(offline.base, files or {}),
                dataclasses.replace(SETTINGS, **changes), folder)
  made._served = served
  return made


async def events_of(ticket) -> list:
  return [event async for event in ticket]


async def refused(ticket) -> Exception:
  with pytest.raises(Exception) as caught:
    await events_of(ticket)
  return caught.value


def run(engine, work):
  """work() while the engine runs; its result."""
  async def main():
    engine.start()
    try:
      return await asyncio.wait_for(work(), 60)
    finally:
      await engine.stop()
  return asyncio.run(main())


def test_every_answer_is_the_offline_one_and_nothing_is_compiled_for_it(offline, served, files):
  """A mix of prompts, prefixes, lengths, kinds and settings, all at once."""
  requests = random_requests(['base', *files], 120)
  made, compiled = make(offline, served), []
  listen = lambda name, *_, **__: compiled.append(name) if 'backend_compile' in name else None

  async def work():
    tickets = [made.submit(request) for request in requests]
    return await asyncio.gather(*map(events_of, tickets))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    answers = run(made, work)
    assert not compiled
    jax.jit(lambda x: 3 * x + len(compiled))(1.5)
    assert compiled, 'the listener hears of no compilation'
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  different = {check(offline, served.bank, request, events)
               for request, events in zip(requests, answers, strict=True)}
  assert len(different) > 70, 'answers that are alike could be crossed unseen'
  now = made.statistics()
  assert max(now.batches) == 4 and now.queued == now.running == 0
  assert now.generated_tokens == sum(event.tokens for events in answers for event in events
                                     if isinstance(event, Finished))


def test_stop_strings_are_looked_for_in_ids_beyond_the_vocabulary_too(offline, served):
  table, lengths = served.programs.bytes_of_ids
  assert len(table) == len(lengths) == offline.base.config.vocab_size > offline.vocabulary.size
  assert bytes(table[-1, :lengths[-1]]).decode('utf-8') == offline.vocabulary.decode([len(table)])


def test_the_base_and_the_prompts_are_models(offline, served):
  base, *prompts = make(offline, served).models()
  assert base.name == 'base' and base.labels is None and base.created > 1.7e9
  assert [model.name for model in prompts] == sorted(served.bank.files)
  named = {model.name: model for model in prompts}
  assert named['before'].labels == ('good', 'bad') and named['before'].task == 'reviews'


def test_a_full_queue_refuses_all_of_a_request_or_nothing(offline, served):
  async def work():
    made.submit(Generation('before', 'a', n=3))
    with pytest.raises(Overloaded) as caught:
      made.submit(Generation('before', 'a', n=2))
    assert caught.value.retry_after and made.health()['queued'] == 3
    for too_many in ([Generation('before', 'a', n=5)], [Generation('before', 'a', n=2)] * 3):
      with pytest.raises(BadRequest, match='more than the 4 that may wait'):  # not: try again
        submit_all(made, too_many)
    made.submit(Generation('end', 'a'))
  made = make(offline, served, max_queue=4)
  asyncio.run(work())


def test_cancelled_and_late_ones_free_their_place_and_hurt_no_other(offline, served):
  made = make(offline, served, chunk=1)
  requests = random_requests(['before', 'end', 'keys'], 24, seed=1)

  async def too_late():
    for _ in range(3):
      with pytest.raises(Late):  # at once or, mostly, behind the others
        await events_of(made.submit(Generation('end', 'a', n=8,
                                               deadline=time.monotonic() + 1e-3)))

  async def work():
    tickets = [made.submit(request) for request in requests]
    late = asyncio.create_task(too_late())
    for ticket in tickets[::2]:
      ticket.cancel()
      ticket.cancel()
    await late
    halfway = made.submit(Generation('before', 'a', n=2))
    async for _ in halfway:
      halfway.cancel()
      break
    cancelled = await asyncio.gather(*map(events_of, tickets[::2]))
    return cancelled, await asyncio.gather(*map(events_of, tickets[1::2]))

  cancelled, answers = run(made, work)
  in_time = [pair for pair in zip(requests[::2], cancelled, strict=True) if not pair[1]]
  assert len(in_time) > 6  # the others were answered before
  for request, events in zip(requests, [x for pair in zip(cancelled, answers, strict=True)
                                        for x in pair], strict=True):
    if events:
      check(offline, served.bank, request, events)
  assert all(answers)
  now = made.statistics()
  assert now.queued == now.running == 0 and now.cancelled == len(in_time) + 1


def test_a_short_answer_does_not_wait_for_a_long_one(offline, served):
  made, order = make(offline, served, chunk=1), []

  async def work():
    async def note(ticket, name):
      await events_of(ticket)
      order.append(name)
    texts = made.submit(Generation('before', 'a film', temperature=2.0, seed=5))
    labels = made.submit(Classification('before', 'a film'))
    await asyncio.gather(note(texts, 'text'), note(labels, 'label'))
  run(made, work)
  assert order == ['label', 'text']


def test_a_failing_batch_fails_alone(offline, served, monkeypatch, caplog):
  def broken(_):
    raise RuntimeError('out of memory')
  made, request = make(offline, served), Generation('end', 'a song')

  async def work():
    good = made.submit(request)
    with monkeypatch.context() as patch:
      patch.setattr(engine_module, 'label_scores', broken)
      error = await refused(made.submit(Classification('before', 'a')))
    assert isinstance(error, Failed) and 'memory' not in error.message
    assert 'out of memory' in caplog.text
    assert isinstance((await events_of(made.submit(Classification('before', 'a'))))[0], Labels)
    return await events_of(good)
  check(offline, served.bank, request, run(made, work))


def test_stopping_finishes_what_was_accepted_and_takes_nothing_more(offline, served):
  requests = random_requests(['before', 'keys'], 20, seed=2)
  made = make(offline, served, chunk=1)

  async def work():
    made.start()
    tickets = [made.submit(request) for request in requests]
    stopping = asyncio.create_task(made.stop())
    await asyncio.sleep(0)
    with pytest.raises(Stopping):
      made.submit(requests[0])
    assert made.health()['status'] == 'stopping'
    answers = await asyncio.gather(*map(events_of, tickets))
    await stopping
    return answers
  for request, events in zip(requests, asyncio.run(work()), strict=True):
    check(offline, served.bank, request, events)


def test_stopping_has_a_time_limit(offline, served, monkeypatch):
  made = make(offline, served, shutdown_seconds=0.0, chunk=1)

  async def work():
    made.start()
    tickets = [made.submit(Generation('before', 'a film', n=4)) for _ in range(40)]
    await made.stop()
    ends = await asyncio.gather(*map(events_of, tickets), return_exceptions=True)
    assert isinstance(ends[-1], Stopping)
    assert all(isinstance(end, Stopping) or len(texts_of(end, 4)) == 4 for end in ends)
  asyncio.run(work())


def test_prompts_come_change_and_go_under_way(offline, served, files, tmp_path):
  save = lambda name, file: prompt_file.save(tmp_path / f'{name}.safetensors', file)
  for name, file in files.items():
    save(name, file)
  folder = PromptFolder(str(tmp_path), reserved='base')
  made = make(offline, None, folder=folder, batch_sizes=(1,), widths=(32,), chunk=1)
  text = lambda name: Generation(name, 'a lovely film', temperature=2.0, seed=1)

  async def work():
    assert {model.name for model in made.models()} == {'base', *files}
    assert await made.reload() == {'added': [], 'removed': [], 'refused': {}}
    before = made._served
    under_way = [(name, made.submit(text(name))) for name in ('end', 'before', 'infix')]
    save('end', prompt(offline.base, 7, 11, 'end'))  # another of its name
    save('new', prompt(offline.base, 2, 12))
    (tmp_path / 'before.safetensors').unlink()
    (tmp_path / 'bad.safetensors').write_bytes(b'garbage')
    told = await made.reload()
    assert (told['added'], told['removed'], list(told['refused'])) == (
        ['end', 'new'], ['before'], ['bad'])
    assert made._served.programs.fresh == 0, 'there was room: nothing compiles'
    with pytest.raises(UnknownModel):
      made.submit(text('before'))
    for name, ticket in under_way:  # accepted with the old bank
      check(offline, before.bank, text(name), await events_of(ticket))
    for name in ('end', 'new', 'infix', 'keys'):
      check(offline, made._served.bank, text(name), await events_of(made.submit(text(name))))
    save('longest_keys', prefix(offline.base, 5, 13))  # of another shape
    waiting = asyncio.create_task(made.reload())
    while not waiting.done():  # the old bank answers while the new one's programs are compiled
      await events_of(made.submit(text('new')))
    assert (await waiting)['added'] == ['longest_keys'] and made._served.programs.fresh == 3
    for name in ('longest_keys', 'keys', 'end'):
      check(offline, made._served.bank, text(name), await events_of(made.submit(text(name))))

  made.prepare()
  run(made, work)


def test_prompts_whose_programs_fail_to_compile_are_refused_and_the_old_go_on(
    offline, served, files, tmp_path, monkeypatch, caplog):
  def broken(*_):
    raise RuntimeError('out of memory')
  made = make(offline, served, folder=PromptFolder(str(tmp_path)))
  for name, file in {**files, 'new': prompt(offline.base, 2, 12)}.items():
    prompt_file.save(tmp_path / f'{name}.safetensors', file)
  with monkeypatch.context() as patch:
    patch.setattr(engine_module, 'compile_programs', broken)
    told = made._reload()
  assert 'new' in told['refused'] and not told['added'] and made._served is served
  assert 'out of memory' in caplog.text
  assert made._reload() == {**told, 'added': []}, 'not tried again while the file is as it was'
  request = Generation('end', 'a song')
  check(offline, served.bank, request, run(made, lambda: events_of(made.submit(request))))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['gpt', 'bart', 'bert'])
def test_other_networks(kind, bpe_file, bart_file, bert_file):
  """Without an encoder, with learned positions, without a decoder."""
  shape = dict(vocab_size=320, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16)
  config, file = {
      'gpt': (GPTConfig(**shape, num_layers=1, max_positions=LONGEST + DECODED + 4), bpe_file),
      'bart': (BartConfig(**shape, num_encoder_layers=1, num_decoder_layers=1,
                          max_positions=LONGEST + 4), bart_file),
      'bert': (BertConfig(**shape, num_encoder_layers=1, max_positions=LONGEST + 4), bert_file),
  }[kind]
  offline = Offline(base_checkpoint.random_base(config, str(file)))
  files = {'one': prompt(offline.base, 4, 0), 'two': prompt(offline.base, 2, 1)}
  made = make(offline, None, files, batch_sizes=(4,), widths=(32,))
  name = offline.base.name
  masks = (offline.base.config.mask_id,) * 4 if kind == 'bert' else ()
  requests = [dataclasses.replace(request, labels=('a', 'is')) if hasattr(request, 'labels')
              else request for request in random_requests([name, *files], 40, seed=3)
              if isinstance(request.inputs, tuple)]
  requests = [dataclasses.replace(request, inputs=(*masks, *request.inputs[len(masks):]))
              for request in requests if not masks or not getattr(request, 'calibrated', False)]

  async def work():
    return await asyncio.gather(*(events_of(made.submit(request)) for request in requests))
  made.prepare()
  for request, events in zip(requests, run(made, work), strict=True):
    check(offline, made._served.bank, request, events)
  with pytest.raises(ValueError, match='positions'):
    make(offline, None, {'long': prompt(offline.base, 6, 0)})
  if kind == 'bert':
    request = Classification(name, (7, 8), labels=('a', 'is'))
    with pytest.raises(BadRequest, match='An input has 0 masks'):
      made._accepts.rows(request, made._served, [7, 8])


def test_settings_that_cannot_be(offline):
  for wrong in (dict(chunk=0), dict(batch_sizes=(8, 1)), dict(widths=(0,)),
                dict(max_decode_length=0), dict(poll_seconds=-1)):
    with pytest.raises(ValueError, match=next(iter(wrong))):
      dataclasses.replace(SETTINGS, **wrong)
