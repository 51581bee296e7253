"""Trains prompts of one task from several seeds, and measures them together.

`python -m prompt_tuning_jax.train_ensemble --seeds 0 1 2 3 4 --gin_file=… --gin.NAME=value …`
"""

import json
import pathlib
import shutil
import sys

from prompt_tuning_jax import cloud_storage, launch, verb

ABOUT = ('Runs `train` once for each seed, in MODEL_DIR/seed_N, and then all prompts on the '
         'evaluation data in the same batches: on average, the best, and together, by majority '
         'vote and by mean probability (MODEL_DIR/ensemble.json). What is done is not done again. '
         'All flags but --seeds are those of `train`. The prompts in MODEL_DIR/prompts are a '
         'folder for eval --prompts and serve.')
MODEL_DIR, SEED = '--gin.MODEL_DIR=', '--gin.run.train.seed='


def checked(argv: list[str], folder: pathlib.Path) -> dict:
  """The arguments of `train`. Raises ValueError, before any training, for what is no ensemble."""
  flags = launch.parse_flags([*argv, f'{MODEL_DIR}{folder}'])
  if flags.dry_run or flags.multiprocess or flags.coordinator_address:
    raise ValueError('An ensemble is trained by one process, seed after seed: leave out --dry_run, '
                     '--multiprocess and --coordinator_address.')
  launch.set_up_process()
  from prompt_tuning_jax.training import run
  launch.read_config(launch.find_files(flags.gin_file, flags.gin_search_paths),
                     flags.gin_bindings, run.train)
  arguments, _ = launch.resolve(run.train, config_text=None)
  run.check_ensemble(arguments['task'], arguments.get('eval_period', 1))
  return arguments


def members(argv: list[str], folder: pathlib.Path, seeds: list[int]) -> dict[str, str]:
  """Trains every seed: {name: the best prompt's file}, copies of them in `folder`/prompts.

  Raises SystemExit where a training was refused, or stopped by a signal.
  """
  from prompt_tuning_jax import prompt_bank
  from prompt_tuning_jax.checkpoints import prompt_file
  from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
  files, prompts = {}, folder / 'prompts'
  prompts.mkdir(parents=True, exist_ok=True)
  for seed in seeds:
    name = f'seed_{seed}'
    own = folder / name
    print(f'Seed {seed}, in {own}', file=sys.stderr)
    if status := launch.train([*argv, f'{MODEL_DIR}{own}', f'{SEED}{seed}']):
      raise SystemExit(status)
    if json.loads((own / 'report.json').read_text(encoding='utf-8'))['stopped']:
      raise SystemExit(0)
    kept = own / 'prompts' / 'best.safetensors'
    if not kept.is_file():
      raise ValueError(f'There is no {kept}: an ensemble is of methods that save one prompt file.')
    prompt_bank.check_kinds(prompt_file.load(kept))
    files[name] = str(prompts / kept.with_stem(name).name)
    with atomic_file(files[name]) as temporary:
      shutil.copyfile(kept, temporary)
  for path in prompts.glob('seed_*.safetensors'):  # of an earlier call, with other seeds
    if path.stem not in files:
      path.unlink()
  return files


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  made = verb.bare_parser('train_ensemble', ABOUT)
  made.add_argument('--seeds', type=int, nargs='+', required=True, metavar='N',
                    help='a prompt is trained from each')
  flags, rest = made.parse_known_args(argv)
  given = [arg.removeprefix(MODEL_DIR) for arg in rest if arg.startswith(MODEL_DIR)]
  others = [arg for arg in rest if not arg.startswith(MODEL_DIR)]

  def work() -> None:
    if len(given) != 1 or any(arg.startswith(SEED) for arg in others):
      raise ValueError(f'An ensemble needs {MODEL_DIR}FOLDER once; --seeds alone say the seeds.')
    if len(set(flags.seeds)) < len(flags.seeds) or len(flags.seeds) < 2:
      raise ValueError(f'An ensemble needs two different seeds or more, got {flags.seeds}.')
    folder = given[0].strip('\'"')
    if cloud_storage.is_remote(folder):
      raise ValueError(f'The MODEL_DIR of an ensemble is a folder of this machine, got {folder}.')
    folder = pathlib.Path(folder).expanduser()
    arguments = checked(others, folder)
    files = members(others, folder, flags.seeds)
    from prompt_tuning_jax.training import ensemble, run
    result = run.evaluate_ensemble(files, folder, **arguments)
    print(ensemble.table(result))
    print(f'{folder}/ensemble.json', file=sys.stderr)

  return verb.exit_status(work)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
