"""``python -m fusion_detox``, which launchers such as ``torchrun`` can start."""

import sys

from fusion_detox.cli import main

if __name__ == "__main__":
    sys.exit(main())
