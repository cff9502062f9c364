"""From files to batches of numpy arrays: tf.data and compiled tokenizers, never jax."""

import os

# TensorFlow only reads data here. Said before its first import: no banner of its C++
# library, and no other rounding of images for the sake of a faster matrix product.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# Nor Keras, which it would import at once (and matplotlib): half a second of a start.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
