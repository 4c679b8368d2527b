"""Prepares BoolQ in TFDS_DATA_DIR: python scripts/download_boolq.py --help."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paxlike.data.builders.boolq import BoolQ
from paxlike.data.builders.prepare import main

if __name__ == "__main__":
    main(BoolQ)
