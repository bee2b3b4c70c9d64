"""Alignment of two cameras that do not see alike: one transformation a rig, found from pairs, stored in rig.json."""
