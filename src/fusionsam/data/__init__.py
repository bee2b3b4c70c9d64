"""Data sets: reading, splits, augmentation, loaders, synthetic scenes."""
