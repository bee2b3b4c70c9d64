"""The labelling page: a folder of pairs, objects by clicks, kept at every change."""
