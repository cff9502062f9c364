"""Ways of fusing image and text, one file each; each exports `Fusion`."""
