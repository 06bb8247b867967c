"""The command line, in this process."""

from vtp.cli import main


def run(*arguments):
    """The exit status of a command of these arguments, of any type."""
    return main([str(argument) for argument in arguments])
