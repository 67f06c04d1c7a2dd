"""``python -m kouros``, and what torchrun starts."""

from kouros.cli import main

if __name__ == "__main__":
    main()
