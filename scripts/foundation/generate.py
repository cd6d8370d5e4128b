"""Make structures and label them with GFN2-xTB, in chunks that can be made in any order.

    python scripts/foundation/generate.py WORK --chunks 0 500

Writes ``WORK/chunks/00000.xyz`` and on. A chunk is a function of its number alone, so a stopped
call goes on by leaving out what is there, and two calls can share the work. Chunk 0 holds the
dimers of all elements.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ase.io
import numpy as np
from molecules import part_of
from sampling import KINDS, MANY, dimers

SEED = 20261122
DRAWS = 20  # molecules, clusters or boxes a chunk
WIDE = 116  # chunks before this one hold single geometries far from the minimum, for walls
PLAIN = 1000  # chunks from this one on hold more molecules and less dynamics


def chunk(number: int) -> list:
    """All structures of one chunk, with the part of the data that they belong to in ``info``."""
    rng = np.random.default_rng([SEED, number])
    if number == 0:
        made = [dimers()]
    else:
        weights, kinds = zip(*(KINDS if number < PLAIN else MANY), strict=True)
        picks = rng.choice(len(kinds), p=np.divide(weights, sum(weights)), size=DRAWS)
        reach = 1.0 if number < WIDE else 0.45
        made = [kinds[pick](rng, reach) for pick in picks]
    frames = []
    for draw, (name, structures) in enumerate(made):
        part = "train" if number == 0 else part_of(name)
        for frame in structures:
            frame.info |= {"part": part, "source": f"{number}-{draw}"}
        frames += structures
    return frames


def main() -> None:
    """Make the chunks that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--chunks", type=int, nargs=2, default=(0, 400), metavar=("FROM", "TO"))
    parser.add_argument("--every", type=int, nargs=2, default=(0, 1), metavar=("WHICH", "OF"))
    arguments = parser.parse_args()
    folder = arguments.work / "chunks"
    folder.mkdir(parents=True, exist_ok=True)
    which, of = arguments.every
    for number in range(*arguments.chunks):
        path = folder / f"{number:05}.xyz"
        if path.exists() or number % of != which:
            continue
        begun = time.perf_counter()
        frames = chunk(number)
        ase.io.write(path.with_suffix(".part"), frames, format="extxyz")
        path.with_suffix(".part").rename(path)
        print(
            f"{path.name}: {len(frames)} structures, {time.perf_counter() - begun:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
