"""Mistakes that are the user's to mend: the command line prints them without a traceback."""


class UserError(Exception):
    """Base of the errors below."""


class DataError(UserError, ValueError):
    """Images that can't be trained on: the message names the folder or file."""


class OutputError(UserError, OSError):
    """An output folder that can't be used: the message names it."""


class OptionError(UserError, ValueError):
    """An option out of range: the message names it, what was expected and what came."""
