"""From a pair set to views on the training device: order, reader, mixing, crops, augment, loader."""
