"""`python -m precast`: the command line, where the script `precast` is not on the path."""

from precast.cli import main

if __name__ == "__main__":
    main()
