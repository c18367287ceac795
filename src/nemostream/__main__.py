"""`python -m nemostream` is `nemostream`."""

from nemostream.cli import main

if __name__ == "__main__":
    main()
