"""TFDS builders, one file each; each exports `Builder`. Written as ArrayRecord."""
