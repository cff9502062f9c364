"""Frozen tokenizers of images: what masked patches have to say."""
