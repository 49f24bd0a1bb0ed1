"""The command line, `taylor-attention`: each module parses one command's arguments and calls the library."""

from __future__ import annotations

import sys

from ..errors import MissingDependencyError, require


def main() -> None:
    """Entry point of `taylor-attention`; exits with 0, 2 (bad input, one line on stderr) or 130 (interrupted)."""
    try:
        require("click", "cli", "the command line")
        require("rich", "cli", "the command line")
    except MissingDependencyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    from .app import app

    app.main(prog_name="taylor-attention")
