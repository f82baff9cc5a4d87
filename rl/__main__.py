"""`python -m trimtab.rl` is `trimtab-rl`."""

from .cli import main

if __name__ == "__main__":
    main()
