"""The entry point of `nemostream` and of `python -m nemostream`."""

from __future__ import annotations

from nemostream.cli.interrupt import exit_on_signals


def main() -> None:
    exit_on_signals()  # before the imports, which take a second: Ctrl-C must not print where they are
    from nemostream.cli.main import main

    main()


if __name__ == "__main__":
    main()
