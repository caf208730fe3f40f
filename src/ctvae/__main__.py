"""`ctvae` and `python -m ctvae`: run a command, and turn what went wrong into one line and an exit code.

0 well done, 2 the user's to mend, 130 interrupted; anything else is our mistake and keeps its traceback.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from ctvae.cli import app
from ctvae.errors import CtvaeError
from ctvae.ranks import leave

INTERRUPTED = 130  # 128 + SIGINT, as shells count
_DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave. `arguments` default to the process's own."""
    leave(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        code = app(args=arguments, prog_name="ctvae", standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except CtvaeError as error:
        return _failed(str(error))
    except typer.TyperException as error:  # an argument is wrong
        return _failed(f"{error.format_message().replace('Value error, ', '')} (see ctvae --help)")
    except OSError as error:
        if error.errno not in _DISK_TROUBLE:
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _failed(f"{place}{error.strerror}; free space or choose another folder, then run the same command again")
    if code == INTERRUPTED:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return INTERRUPTED
    return code or 0


def _failed(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
