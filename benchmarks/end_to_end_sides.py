"""The two sides that end_to_end.py compares: each tokenises, trains an epoch and evaluates."""

import argparse
import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np

from prompt_tuning_jax import optimizers, param_paths
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.data import batches, token_cache
from prompt_tuning_jax.data.prefetch import Prefetch
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.partitioning import Partitioner
from prompt_tuning_jax.predictor import Predictor
from prompt_tuning_jax.training import evaluate, methods
from prompt_tuning_jax.training import state as train_state
from prompt_tuning_jax.training.step import Recipe, make_train_step

LENGTHS = {'inputs': 512, 'targets': 8}
FILES = {'train': 'train.jsonl', 'validation': 'validation.jsonl'}
FIXED = batches.Buckets((), ())


def texts(folder: pathlib.Path, split: str) -> tuple[list[str], list[str]]:
  """(inputs, labels) of a split."""
  rows = [json.loads(line) for line in (folder / FILES[split]).read_text('utf-8').splitlines()]
  return [row['text'] for row in rows], [row['label'] for row in rows]


class Ours:
  """Our side: `tokenise`, `train` and `evaluate` are the parts of a turn."""

  def __init__(self, base: Base, prompt: np.ndarray, folder: pathlib.Path,
               flags: argparse.Namespace, fixed: bool = False):
    self.folder, self.flags = folder, flags
    self.cache_dir = folder / 'tokens'
    self.task = TextFile(str(folder / FILES['train']), str(folder / FILES['validation']))
    self.vocabulary = Vocabulary.of_base(base)
    method = methods.PromptTuning(flags.prompt_length)
    config = dataclasses.replace(base.config, dropout_rate=0.1)
    self.model = method.model(config)
    self.virtual = method.virtual_tokens(config.vocab_size)
    self.buckets, self.partitioner = (FIXED if fixed else None), Partitioner()
    self.trainable, self.frozen = {'prompt': {'embedding': prompt}}, base.params
    self.optimizer = optimizers.adafactor()
    self.step = make_train_step(
        Recipe(self.model, self.optimizer, partitioner=self.partitioner))
    self.predictor = Predictor(self.model, self.vocabulary, self.virtual, flags.batch_size,
                               flags.label_tokens, self.partitioner)
    self.tokenise(warm=True)

  def tokenise(self, warm: bool = False) -> None:
    """Makes the token caches of both splits, or opens them."""
    if not warm:
      shutil.rmtree(self.cache_dir, ignore_errors=True)
    self.caches = {split: token_cache.open_or_build(self.task, split, self.vocabulary, LENGTHS,
                                                    self.cache_dir) for split in FILES}

  def train(self) -> None:
    """One epoch from the first prompt."""
    cache = self.caches['train']
    source = batches.TrainBatches([cache], self.flags.batch_size, 0, self.virtual, self.buckets)
    state = self.partitioner.replicate(train_state.create(
        jax.tree.map(jax.numpy.array, self.trainable), self.optimizer))
    put = lambda step: self.partitioner.put_batch(source.batch_at(step))
    with Prefetch(put) as feed:
      for _ in range(cache.num_examples // self.flags.batch_size):
        state, _ = self.step(state, self.frozen, next(feed))
      jax.block_until_ready(state)
    self.trained = state.trainable

  def evaluate(self, rank_labels: bool = True) -> dict:
    """The accuracy of the validation rows."""
    measure = evaluate.Evaluator(self.predictor, self.caches['validation'],
                                 rank_labels=rank_labels)
    return measure(param_paths.merge(self.trained, self.frozen)).values

  def loss(self) -> float:
    """Nats of a target token of the first training rows, with the first prompt and no dropout."""
    self.trained = self.trainable
    cache, count = self.caches['train'], self.flags.batch_size
    targets = [cache.targets(i) for i in range(count)]
    scores = self.predictor.score(param_paths.merge(self.trainable, self.frozen),
                                  [cache.inputs(i) for i in range(count)], targets)
    return -float(np.sum(scores)) / sum(map(len, targets))

  def ids(self, split: str) -> list[list[int]]:
    cache = self.caches[split]
    return [cache.inputs(i).tolist() for i in range(cache.num_examples)]


class Peft:
  """PEFT's side, the same parts."""

  def __init__(self, base: pathlib.Path, prompt: np.ndarray, folder: pathlib.Path,
               flags: argparse.Namespace, fixed: bool = False):
    import peft
    import torch
    import transformers
    torch.set_num_threads(flags.threads)
    self.folder, self.flags, self.fixed, self.torch = folder, flags, fixed, torch
    self.transformers = transformers
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    network = transformers.T5ForConditionalGeneration.from_pretrained(base)
    # One submodule: else PEFT makes a second prompt, for the decoder, that is never used.
    self.model = peft.get_peft_model(network, peft.PromptTuningConfig(
        task_type='SEQ_2_SEQ_LM', num_virtual_tokens=len(prompt), num_transformer_submodules=1))
    self.trained, = (leaf for leaf in self.model.parameters() if leaf.requires_grad)
    self.start = torch.tensor(prompt)
    self.reset()
    self.tokenise()

  def reset(self) -> None:
    """The first prompt again."""
    with self.torch.no_grad():
      self.trained.copy_(self.start)

  def tokenise(self) -> None:
    """Every row's tokens, as a list that Trainer takes."""
    padding = {'padding': 'max_length'} if self.fixed else {}
    self.data = {}
    for split in FILES:
      inputs, labels = texts(self.folder, split)
      rows = self.tokenizer(inputs, truncation=True, max_length=LENGTHS['inputs'], **padding)
      targets = self.tokenizer(labels, truncation=True, max_length=LENGTHS['targets'])['input_ids']
      self.data[split] = [
          {'input_ids': ids, 'attention_mask': mask, 'labels': target} for ids, mask, target
          in zip(rows['input_ids'], rows['attention_mask'], targets, strict=True)]

  def train(self) -> None:
    """One epoch from the first prompt."""
    self.reset()
    arguments = self.transformers.Seq2SeqTrainingArguments(
        output_dir=str(self.folder / 'trainer'), num_train_epochs=1, optim='adafactor',
        per_device_train_batch_size=self.flags.batch_size, learning_rate=0.3,
        per_device_eval_batch_size=self.flags.batch_size, lr_scheduler_type='constant',
        save_strategy='no', eval_strategy='no', logging_strategy='no', report_to=[],
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, dataloader_drop_last=True,
        remove_unused_columns=False, label_names=['labels'], predict_with_generate=True,
        generation_max_length=self.flags.label_tokens + 1)  # the start token counts there
    self.trainer = self.transformers.Seq2SeqTrainer(
        model=self.model, args=arguments, train_dataset=self.data['train'],
        eval_dataset=self.data['validation'], processing_class=self.tokenizer,
        data_collator=self.transformers.DataCollatorForSeq2Seq(self.tokenizer),
        compute_metrics=self._accuracy)
    self.trainer.train()

  def evaluate(self) -> dict:
    """The accuracy of the validation rows."""
    return self.trainer.evaluate()

  def _accuracy(self, predicted) -> dict:
    decode = lambda ids: self.tokenizer.batch_decode(np.where(ids < 0, 0, ids),
                                                     skip_special_tokens=True)
    pairs = list(zip(decode(predicted.predictions), decode(predicted.label_ids), strict=True))
    return {'accuracy': 100 * sum(a == b for a, b in pairs) / len(pairs)}

  def loss(self) -> float:
    """As `Ours.loss`."""
    collate = self.transformers.DataCollatorForSeq2Seq(self.tokenizer)
    with self.torch.no_grad():
      batch = collate(self.data['train'][:self.flags.batch_size])
      return float(self.model.eval()(**batch).loss)

  def ids(self, split: str) -> list[list[int]]:
    return [row['input_ids'] for row in self.data[split]]
