"""The error that a user can mend."""


class UserError(ValueError):
    """A mistake in what the user gave: a flag, a file, a row, a checkpoint of the wrong kind.

    The message is one or two lines that name the value, the place and the remedy. A command that ends on it prints
    just these lines and exits with code 2.
    """


__all__ = ["UserError"]
