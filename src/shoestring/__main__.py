"""`python -m shoestring` is the command `shoestring`."""

import sys

from shoestring.cli import main

if __name__ == "__main__":
    sys.exit(main())
