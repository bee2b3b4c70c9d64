"""Tables and panels from a folder of evaluations."""
