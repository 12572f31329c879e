"""Test, tune and measure the GPU kernels of this source tree: see scripts/gpu_check.sh."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from gpu_check import records
from gpu_check.plan import LOG, RECORDS, SUMMARY, missing, names, stages
from gpu_check.runner import Run
from gpu_check.summary import failed, summary

# Of the time: for the start, and for what comes after the parts.
_RESERVED_S = 8.0


def main() -> int:
    begin = time.monotonic()
    options = arguments()
    lacking = missing(options.device)
    if lacking:
        print(f"gpu_check: {lacking}: nothing was tested or measured", file=sys.stderr)
        return 2
    # A run that is cut short still says what it has.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu_check: asked to end"))
    options.out.mkdir(parents=True, exist_ok=True)
    output = options.out / RECORDS
    output.unlink(missing_ok=True)
    try:
        with (options.out / LOG).open("w", encoding="utf-8") as log:
            Run(stages(options), options.seconds - _RESERVED_S, output, log, lambda line: print(line, flush=True))()
    finally:
        found, broken = records.read(output)
        lines = summary(found, broken, time.monotonic() - begin)
        (options.out / SUMMARY).write_text("\n".join(lines) + "\n", "utf-8")
        print("\n" + "\n".join(lines), flush=True)
    return 1 if failed(found, broken) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__)
    parser.add_argument("--seconds", type=float, default=570, help="in all (%(default)s); less leaves the least out")
    parser.add_argument("--only", nargs="+", choices=names(), help="these stages")
    parser.add_argument("--commit", metavar="HASH", help="what the figures belong to, where there is no repository")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to run (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small sizes: with --device cpu, a trial of the scripts")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or "gpu_results"),
        help="folder to write to (%(default)s)",
    )
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        parser.error("the full sizes need a GPU: add --tiny, which tries the scripts, or leave --device out")
    if options.seconds < 60 and not options.tiny:
        parser.error(f"--seconds must be 60 at least, not {options.seconds:g}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
