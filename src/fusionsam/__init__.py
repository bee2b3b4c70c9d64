"""FusionSAM: fuse a visible and a thermal image into one picture and label every pixel."""

__version__ = "0.1.0"
