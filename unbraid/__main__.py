"""``python -m unbraid``, for torchrun."""

import sys

from unbraid.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
