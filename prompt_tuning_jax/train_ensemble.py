"""Trains prompts of one task from several seeds, and measures them together.

`python -m prompt_tuning_jax.train_ensemble --seeds 0 1 2 3 4 --gin_file=… --gin.NAME=value …`
"""

import pathlib
import shutil
import sys

from prompt_tuning_jax import launch, verb

ABOUT = ('Runs `train` once for each seed, in MODEL_DIR/seed_N, and then all prompts on the '
         'evaluation data in the same batches: on average, the best, and together, by majority '
         'vote and by mean probability (MODEL_DIR/ensemble.json). What is done is not done again. '
         'All flags but --seeds are those of `train`. The prompts in MODEL_DIR/prompts are a '
         'folder for eval --prompts and serve.')
MODEL_DIR = '--gin.MODEL_DIR='


def members(argv: list[str], folder: pathlib.Path, seeds: list[int]) -> dict[str, str]:
  """Trains every seed: {name: the best prompt's file}, copies of them in `folder`/prompts.

  Raises SystemExit with the status of a training that was refused.
  """
  files, prompts = {}, folder / 'prompts'
  prompts.mkdir(parents=True, exist_ok=True)
  for seed in seeds:
    name = f'seed_{seed}'
    own = folder / name
    print(f'Seed {seed}, in {own}', file=sys.stderr)
    if status := launch.train([*argv, f'{MODEL_DIR}{own}', f'--gin.run.train.seed={seed}']):
      raise SystemExit(status)
    kept = next(iter((own / 'prompts').glob('best.safetensors')), None)
    if kept is None:
      raise ValueError(f'{own}/prompts has no best.safetensors: an ensemble is of single prompt '
                       'files that were evaluated; choose such a method, and EVAL_PERIOD above 0.')
    from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
    files[name] = str(prompts / f'{name}.safetensors')
    with atomic_file(files[name]) as temporary:
      shutil.copyfile(kept, temporary)
  return files


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  made = verb.bare_parser('train_ensemble', ABOUT)
  made.add_argument('--seeds', type=int, nargs='+', required=True, metavar='N',
                    help='a prompt is trained from each')
  flags, rest = made.parse_known_args(argv)
  given = [arg.removeprefix(MODEL_DIR) for arg in rest if arg.startswith(MODEL_DIR)]

  def work() -> None:
    if len(given) != 1 or '--dry_run' in rest:
      raise ValueError(f'An ensemble needs {MODEL_DIR}FOLDER once, and no --dry_run.')
    if len(set(flags.seeds)) < len(flags.seeds) or len(flags.seeds) < 2:
      raise ValueError(f'An ensemble needs two different seeds or more, got {flags.seeds}.')
    folder = pathlib.Path(given[0].strip('\'"')).expanduser()
    files = members([arg for arg in rest if not arg.startswith(MODEL_DIR)], folder, flags.seeds)
    from prompt_tuning_jax.training import ensemble, run
    result = run.evaluate_ensemble(files, folder, **launch.resolve(run.train, config_text=None)[0])
    print(ensemble.table(result))
    print(f'{folder}/ensemble.json', file=sys.stderr)

  return verb.exit_status(work)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
