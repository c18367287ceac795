"""Entry point of `nemostream` and `python -m nemostream`."""

from __future__ import annotations

from nemostream.cli.interrupt import exit_on_signals


def main() -> None:
    """Run the command line."""
    exit_on_signals()  # before the imports, which take a second: Ctrl-C must not print a traceback
    from nemostream.cli.main import main

    main()


if __name__ == "__main__":
    main()
