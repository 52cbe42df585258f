"""The command line. One file per command; :mod:`unbackdoor.cli.app` is the table of them."""

from __future__ import annotations


def main() -> None:
    """Run the command line on ``sys.argv`` and exit with its status."""
    from unbackdoor.cli.app import app

    app()
