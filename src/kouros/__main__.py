"""``python -m kouros``, and what torchrun starts."""

import sys

from kouros.cli import main

if __name__ == "__main__":
    sys.exit(main())
