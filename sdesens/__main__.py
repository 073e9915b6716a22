"""`python -m sdesens`, and `torchrun -m sdesens`: the command line."""

from sdesens.cli import main

if __name__ == "__main__":
    main()
