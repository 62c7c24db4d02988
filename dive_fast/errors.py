"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Bad input: the message names the argument, what was expected, what came, and the remedy.

    The command line prints the message alone and exits with code 2.
    """
