"""`dtbert build`: the CPU's steps compiled for this machine."""

import argparse
import time

SUMMARY = "compile the CPU's steps for this machine"
DESCRIPTION = """\
Compile the steps of the network for this processor and this torch, once: half
a minute, with g++ or clang++. From then on every model on the CPU uses them;
without them dtbert runs on torch's own.
"""
EXAMPLES = """\
example:
  dtbert build
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(arguments: argparse.Namespace) -> int:
    from dtbert.kernels import native

    target = native.library()
    if target.is_file():
        print(f"built before: {target}")
    else:
        began = time.monotonic()
        try:
            native.build()
        except native.BuildError as error:
            raise ValueError(f"{error}; dtbert runs without it, on torch's own steps") from error
        print(f"built in {time.monotonic() - began:.0f} s: {target}")
    if not native.available():
        raise ValueError(f"what was built does not give the right numbers here: remove {target}")
    return 0
