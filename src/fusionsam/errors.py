"""What is raised for bad input."""


class InputError(ValueError):
    """Bad input from outside: a file, a folder, a setting. The message is one line that names the input, what was
    found, what was expected and what to do; the command line prints it and exits with code 2."""


class NoSplit(InputError):
    """What was asked for is not there at all, which some may live without, unlike what is there and flawed."""
