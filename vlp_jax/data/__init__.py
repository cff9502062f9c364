"""From files to batches of numpy arrays: tf.data and compiled tokenizers, never jax."""
