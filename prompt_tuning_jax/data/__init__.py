"""From tasks and text files to batches. Only `seqio_builder` imports SeqIO and TensorFlow."""
