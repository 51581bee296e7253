"""Benchmarks as SeqIO tasks, one a file; importing a file registers its tasks.

Importing this package registers nothing, so that `metrics`, `postprocessors` and `noise`, which
know neither SeqIO nor TensorFlow, can be imported alone. The token cache's builder imports every
file.

A file may name the TFDS data its tasks read in a literal dictionary `TFDS_DATASETS`, task name to
'dataset/config:version' names: it is read without importing the file, so that missing data is told
before TensorFlow has even started.
"""
