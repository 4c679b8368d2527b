"""A command line on the toy configs, resolved or refused."""

import pytest

from configs import flags
from configs.flags import UsageError

PILE = "--fdl_config=toy_package.gpt.Pile126M"


def resolve(*words, environ=None):
    return flags.resolve(["main.py", *words], environ or {})


def refused(*words, environ=None) -> str:
    """The error line of a command; it must be one line."""
    with pytest.raises(UsageError) as error:
        resolve(*words, environ=environ)
    assert "\n" not in str(error.value)
    return str(error.value)
