"""`python -m grist_data.export`: the counterpart of import.py."""

from __future__ import annotations

import sys

from grist_data.export_tokens import main

if __name__ == "__main__":
    sys.exit(main())
