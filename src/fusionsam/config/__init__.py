"""Settings: dataclasses, presets, files and flags, data sets."""
