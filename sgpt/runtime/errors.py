"""The one exception that a user can cause."""


class InputError(ValueError):
    """Wrong input or configuration: the message says what, the value got and what to do.

    Scripts print it and exit with 2.
    """
