"""Random-access data sets, one file each; each exports `Source`."""
