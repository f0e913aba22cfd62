"""python -m metaopt is the command metaopt."""

from metaopt.cli import main

if __name__ == "__main__":
    main()
