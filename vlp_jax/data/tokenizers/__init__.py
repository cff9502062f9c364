"""From captions to ids, one file each; each exports `Tokenizer`."""
