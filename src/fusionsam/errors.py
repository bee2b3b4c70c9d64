"""What is raised for bad input, under the name that users of the package know: `fusionsam.errors.InputError`.

The classes stand in `types`, with the other nouns that every part speaks of."""

from fusionsam.types import InputError, NoSplit

__all__ = ["InputError", "NoSplit"]
