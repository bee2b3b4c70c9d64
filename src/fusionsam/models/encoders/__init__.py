"""SAM's image encoders: a convolutional backbone, TinyViT, SAM's ViT or SAM2's Hiera."""
