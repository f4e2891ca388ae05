"""One tree of errors. The command line prints them as one line and exits with `exit_code`.

A good message names the file, the tensor or key, the value, the rule, and the remedy.
"""


class DsqError(Exception):
    """Something failed that is not the input's fault: exit code 1."""

    exit_code = 1


class InputError(DsqError):
    """The input or the command line is wrong: exit code 2."""

    exit_code = 2


class UnsupportedError(InputError):
    """The input is well formed, but uses something dsq does not support."""
