"""`python -m grist_data.import`: the word is a keyword, so that the module to import is grist_data.import_tokens."""

from __future__ import annotations

import sys

from grist_data.import_tokens import main

if __name__ == "__main__":
    sys.exit(main())
