"""The command line: reads the arguments, and has the command run.

PyTorch and all that comes with it, seconds, are imported once there is a command to run: not for help, the
version or an argument that is wrong. See `vtp/__init__.py` for the other half of that.
"""

import sys
from collections.abc import Sequence

_INTERRUPTED = 130  # as a shell says of SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 training failed, 2 bad input, 128 + signal."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        from vtp.arguments import make_parser

        options = make_parser().parse_args(arguments)

        from vtp.execution import execute
    except KeyboardInterrupt:
        print("vtp: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return execute(options, arguments)


if __name__ == "__main__":
    sys.exit(main())
