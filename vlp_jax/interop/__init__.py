"""Other people's checkpoints <-> our trees, one file a format; nothing needs torch."""
