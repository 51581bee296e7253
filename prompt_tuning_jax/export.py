"""Converts prompts: `python -m prompt_tuning_jax.export --prompt=… --to=… --output=…`."""

import os
import sys

from prompt_tuning_jax import cloud_storage, launch, verb

ABOUT = ('Writes a prompt for other libraries, or one of theirs as a prompt file. --to=peft is a '
         "folder of PEFT's prompt tuning; numpy the .npy [P, D] of google-research/prompt-tuning; "
         'prompt_embeds safetensors for what takes embeddings in place of ids (inputs_embeds of '
         'transformers, prompt_embeds of vLLM); prompt_file a prompt file.')
TO = ('peft', 'numpy', 'prompt_embeds', 'prompt_file')
ONLY_WITH = {'base_model_name': 'peft', 'decoder_only': 'peft', 'input': 'prompt_embeds',
             'dtype': 'prompt_embeds', 'max_input_length': 'prompt_embeds'}
MAX_INPUT_LENGTH = 512


def parser():
  """The flags of this verb."""
  made = verb.bare_parser('export', ABOUT)
  add = made.add_argument
  add('--prompt', required=True, type=verb.path, metavar='FILE_OR_FOLDER',
      help='a prompt file, a .npy prompt, or a PEFT folder')
  add('--to', required=True, choices=TO, help='what to write')
  add('--output', required=True, type=verb.path, metavar='PATH',
      help='the file to write (peft: the folder)')
  add('--base', metavar='NAME_OR_FOLDER',
      help="the prompt's base: checks that they belong together; names it in a prompt file; "
           'embeds the rows of --input')
  add('--base_model_name', metavar='NAME',
      help="peft: its base_model_name_or_path (default: the base's name in the prompt file)")
  add('--decoder_only', action='store_true', default=None,
      help='peft: the base has no encoder (GPT-2); told by --base or a PEFT folder if given')
  add('--input', type=verb.path, metavar='FILE.jsonl',
      help='prompt_embeds: write row_0, row_1, … [P + n, D], the prompt in each row\'s "inputs" '
           '(text) or "input_tokens" (ids ending in the end-of-sequence id)')
  add('--dtype', choices=('float32', 'float16', 'bfloat16'),
      help='prompt_embeds: of what is written (default float32)')
  add('--max_input_length', type=int, metavar='TOKENS',
      help=f'prompt_embeds: longer inputs are cut (default {MAX_INPUT_LENGTH})')
  add('--network', metavar='NAME', help='such as t5_1_1_base, for a T5X folder')
  add('--vocabulary', type=verb.path, metavar='FILE',
      help="the base's SentencePiece file, tokenizer.json or vocab.txt, if not beside it")
  return made


def check(flags) -> None:
  """Raises ValueError for flags and files that cannot be."""
  for name, kind in ONLY_WITH.items():
    if getattr(flags, name) is not None and flags.to != kind:
      raise ValueError(f'--{name} belongs to --to={kind}, got --to={flags.to}.')
  if flags.input and not flags.base:
    raise ValueError('--input needs the base, whose embeddings its rows take: add --base.')
  if flags.max_input_length is not None and flags.max_input_length < 1:
    raise ValueError(f'--max_input_length must be at least 1, got {flags.max_input_length}.')
  files = [flags.input] if flags.input else []
  if not os.path.isdir(flags.prompt):  # what is wrong with a folder is told when it is read
    files.append(flags.prompt)
  if os.path.realpath(flags.output) == os.path.realpath(flags.prompt):  # a folder, maybe
    raise ValueError(f'{flags.output} is read, and would be written over: name another --output.')
  verb.check_files(files,
                   os.path.join(flags.output, 'file') if flags.to == 'peft' else flags.output)


def export(flags) -> None:
  """Writes what flags ask for. What the prompt alone can tell is told before the base is read."""
  from prompt_tuning_jax.checkpoints import base_checkpoint, peft_adapter, prompt_file
  prompt, base = prompt_file.load(flags.prompt), None
  if flags.to == 'peft':
    peft_adapter.rows_before_text(prompt)
    peft_adapter.check_replaceable(flags.output)
  elif flags.to != 'prompt_file':
    peft_adapter.soft_prompt(prompt, flags.to)
  if flags.base:
    network = launch.network_named(flags.network) if flags.network else None
    base = base_checkpoint.load_base(flags.base, config=network, vocabulary_file=flags.vocabulary,
                                     dtype=None)
    prompt_file.check(prompt, base)
  {'peft': to_peft, 'numpy': to_numpy, 'prompt_file': to_prompt_file,
   'prompt_embeds': rows_to_prompt_embeds if flags.input else to_prompt_embeds,
   }[flags.to](flags, prompt, base)


def to_peft(flags, prompt, base) -> None:
  """Writes a folder of PEFT's prompt tuning."""
  from prompt_tuning_jax.checkpoints import peft_adapter
  is_decoder_only = bool(flags.decoder_only)
  if base is not None:
    if 'decoder' not in base.config.attentions:
      raise ValueError(f'The base {base.name!r} is a masked language model, for which PEFT has no '
                       'prompt tuning.')
    has_encoder = 'encoder' in base.config.attentions
    if is_decoder_only and has_encoder:
      raise ValueError(f'The base {base.name!r} has an encoder: leave out --decoder_only.')
    is_decoder_only = not has_encoder
  elif peft_adapter.is_folder(flags.prompt):
    is_decoder_only |= peft_adapter.is_decoder_only(flags.prompt)
  name = (flags.base_model_name or (prompt.metadata.get('base') or {}).get('name')
          or base and base.name)
  peft_adapter.write(flags.output, prompt, name, is_decoder_only)


def to_numpy(flags, prompt, base) -> None:
  """Writes the .npy of google-research/prompt-tuning."""
  import numpy as np

  from prompt_tuning_jax.checkpoints import prompt_file
  from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
  _tell_placement(prompt)
  with atomic_file(flags.output) as temporary, open(temporary, 'wb') as file:
    np.save(file, prompt.params[prompt_file.EMBEDDING], allow_pickle=False)


def to_prompt_embeds(flags, prompt, base) -> None:
  """Writes the prompt alone, as `prompt_embeds` [P, D]."""
  from prompt_tuning_jax.checkpoints import prompt_file
  _tell_placement(prompt)
  rows = prompt.params[prompt_file.EMBEDDING]
  _write_arrays(flags, {'prompt_embeds': rows.shape}, lambda _: rows)


def rows_to_prompt_embeds(flags, prompt, base) -> None:
  """Writes what the base embeds of each row of flags.input, the prompt in its place."""
  import numpy as np

  from prompt_tuning_jax import jsonl, prompted_base
  from prompt_tuning_jax.checkpoints import prompt_file
  from prompt_tuning_jax.data.vocabulary import Vocabulary
  from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
  vocabulary = Vocabulary.of_base(base)
  texts = prompted_base.PromptedBase(None, base.params, vocabulary, prompt.metadata)
  table, rows = np.asarray(base.embedding), prompt.params[prompt_file.EMBEDDING]
  virtual = VirtualTokens(len(table), len(rows), prompt.metadata.get('placement') or 'before')
  longest = flags.max_input_length or MAX_INPUT_LENGTH
  placed = {f'row_{number}': virtual.place(texts.tokens(place, row, 'input', longest))
            for number, (place, row) in enumerate(jsonl.rows(flags.input))}
  if not placed:
    raise ValueError(f'{flags.input} has no rows.')

  def embedded(name: str) -> np.ndarray:
    ids = placed[name]
    is_virtual = ids >= len(table)
    made = table[np.where(is_virtual, 0, ids)].astype(np.float32)
    made[is_virtual] = rows[ids[is_virtual] - len(table)]
    return made

  _write_arrays(flags, {name: (len(ids), rows.shape[1]) for name, ids in placed.items()}, embedded)


def to_prompt_file(flags, prompt, base) -> None:
  """Writes a prompt file: with what the old one told, and with what the base is.

  What an imported prompt does not tell, such as its labels, stays untold.
  """
  import prompt_tuning_jax
  from prompt_tuning_jax.checkpoints import prompt_file
  rows = prompt.params.get(prompt_file.EMBEDDING)
  known = {} if rows is None else {'method': 'prompt_tuning', 'placement': 'before',
                                   'length': len(rows)}
  known |= {'version': prompt_tuning_jax.__version__, **prompt.metadata}
  if base is not None:
    about = prompt_file.describe(base)
    known |= {key: about[key] for key in ('base', 'vocabulary')}
  prompt_file.save(flags.output, prompt_file.PromptFile(prompt.params, known))


def _write_arrays(flags, shapes, get) -> None:
  """Writes {name: shape} as flags.dtype, asking get(name) for one array after the other."""
  import jax.numpy as jnp
  import numpy as np

  from prompt_tuning_jax.checkpoints import safetensors_file
  from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
  dtype = flags.dtype or 'float32'

  def converted(name: str) -> np.ndarray:
    with np.errstate(over='ignore'):
      array = get(name).astype(jnp.dtype(dtype))
    if not np.isfinite(array.astype(np.float32)).all():
      raise ValueError(f'{name} has numbers too large for {dtype}: take --dtype=bfloat16 or '
                       'float32.')
    return array

  with atomic_file(flags.output) as temporary:
    safetensors_file.write(temporary, {name: (dtype, shape) for name, shape in shapes.items()},
                           converted, {'format': 'pt'})


def _tell_placement(prompt) -> None:
  """Says where the prompt belongs, where the file that is written cannot."""
  placement = prompt.metadata.get('placement') or 'before'
  if placement != 'before':
    print(f'note: the rows alone do not say that this prompt was trained placed {placement!r}.',
          file=sys.stderr)


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  flags = parser().parse_args(argv)
  launch.set_up_process()

  def work() -> None:
    flags.prompt = cloud_storage.fetch(flags.prompt)
    check(flags)
    export(flags)

  return verb.exit_status(work)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
