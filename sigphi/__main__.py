"""`python -m sigphi`, the same as the `sigphi` command."""

from sigphi.cli import main

if __name__ == "__main__":
    main()
