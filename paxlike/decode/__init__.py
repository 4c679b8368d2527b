"""Decoding: continuations of prompts by one compiled loop over a key/value cache."""

from paxlike.decode.command import decode
from paxlike.decode.generator import Generation, Generator, Throughput
from paxlike.decode.prompts import Prompt, read_prompts
from paxlike.decode.sampler import SamplingOptions, sample

__all__ = [
    "Generation",
    "Generator",
    "Prompt",
    "SamplingOptions",
    "Throughput",
    "decode",
    "read_prompts",
    "sample",
]
