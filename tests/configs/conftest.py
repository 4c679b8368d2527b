"""Makes the toy configs importable as `toy_package`, by name, as the JSON of a config needs it."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent))
