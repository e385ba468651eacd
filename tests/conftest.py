"""The stages are scripts at the top of the project: let tests import them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
