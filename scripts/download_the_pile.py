"""Prepares the Pile in TFDS_DATA_DIR: python scripts/download_the_pile.py --help."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paxlike.data.builders.prepare import main
from paxlike.data.builders.the_pile import ThePile

if __name__ == "__main__":
    main(ThePile)
