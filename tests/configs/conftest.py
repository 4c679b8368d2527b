"""Makes the toy configs importable as `toy_package`, by name, as the JSON of a config needs it."""

import pathlib
import sys

import pytest
from absl import flags as absl_flags

sys.path.append(str(pathlib.Path(__file__).parent))


@pytest.fixture
def absl():
    own = absl_flags.FlagValues()
    absl_flags.DEFINE_string("job_log_dir", None, "folder of the run", flag_values=own)
    absl_flags.DEFINE_enum("mode", "train", ["train", "eval"], "what to do", flag_values=own)
    absl_flags.DEFINE_integer("port", 1, "a port", flag_values=own)
    return own
