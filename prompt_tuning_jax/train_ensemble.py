"""Trains prompts of one task from several seeds, and measures them together.

`python -m prompt_tuning_jax.train_ensemble --seeds 0 1 2 3 4 --gin_file=… --gin.NAME=value …`
"""

import pathlib
import shutil
import sys

from prompt_tuning_jax import many_runs, verb
from prompt_tuning_jax.many_runs import MODEL_DIR, SEED

ABOUT = ('Trains a prompt from each seed, in MODEL_DIR/seed_N, several of them together over one '
         'base, and then measures all prompts on the evaluation data in the same batches: on '
         'average, the best, and together, by majority vote and by mean probability '
         '(MODEL_DIR/ensemble.json). What is done is not done again. All flags but --seeds and '
         '--at_once are those of `train`. The prompts in MODEL_DIR/prompts are a folder for eval '
         '--prompts and serve.')


def members(argv: list[str], folder: pathlib.Path, seeds: list[int], at_once: int,
            ) -> dict[str, str]:
  """Trains every seed: {name: the best prompt's file}, copies of them in `folder`/prompts.

  Raises ValueError where a training was refused or diverged, SystemExit where a signal stopped it.
  """
  from prompt_tuning_jax import prompt_bank
  from prompt_tuning_jax.checkpoints import prompt_file
  from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
  from prompt_tuning_jax.training import run
  outcomes = many_runs.train(
      {f'seed_{seed}': [*argv, f'{MODEL_DIR}{folder}/seed_{seed}', f'{SEED}{seed}']
       for seed in seeds}, at_once,
      lambda given: run.check_ensemble(given['task'], given.get('eval_period', 1)))
  for name, outcome in outcomes.items():
    if isinstance(outcome, ValueError):
      raise ValueError(f'{name}: {outcome}')
  files, prompts = {}, folder / 'prompts'
  prompts.mkdir(parents=True, exist_ok=True)
  for name in outcomes:
    kept = folder / name / 'prompts' / 'best.safetensors'
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
  made = many_runs.flags_of(verb.bare_parser('train_ensemble', ABOUT),
                            'a prompt is trained from each', required=True)
  flags, rest = many_runs.parsed(made, argv)

  def work() -> None:
    given, others = many_runs.folder_of(rest)
    if len(set(flags.seeds)) < len(flags.seeds) or len(flags.seeds) < 2:
      raise ValueError(f'An ensemble needs two different seeds or more, got {flags.seeds}.')
    folder = pathlib.Path(given).expanduser()
    files = members(others, folder, flags.seeds, flags.at_once)
    from prompt_tuning_jax.training import ensemble, run
    result = run.evaluate_ensemble(
        files, folder, **many_runs.configured([*others, f'{MODEL_DIR}{folder}']))
    print(ensemble.table(result))
    print(f'{folder}/ensemble.json', file=sys.stderr)

  return verb.exit_status(work)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
