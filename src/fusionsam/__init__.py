"""FusionSAM: fuse a visible and a thermal image and label every pixel."""
