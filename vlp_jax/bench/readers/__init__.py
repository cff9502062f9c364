"""Ways from files to batches of uint8 images, each a process of its own.

The file is the registry. Each reads the same files, takes the same kind of random
windows, mirrors half of them, and makes uint8 batches; captions are no part of it.
`bare` only decodes. A file other than `ours` needs nothing of ours but this folder's
`work` and `bench/timing.py`: another interpreter may run it.
"""
