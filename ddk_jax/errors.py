"""Errors that a user can act on: the command line prints one line and exits with their code."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong usage or configuration. The message says what, where, and what to do."""

    exit_code = 64


class DoesNotFitError(UserError):
    """What was planned needs more memory than the slice has."""

    exit_code = 3


class DataError(UserError):
    """The corpus or the prepared data is missing, broken or does not match."""

    exit_code = 65


class DivergedError(UserError):
    """Training produced non-finite updates; starting it again would do the same."""

    exit_code = 70


class StorageError(UserError):
    """Something could not be read or written."""

    exit_code = 74


class RunHeldError(UserError):
    """Another process is writing to the run directory."""

    exit_code = 75
