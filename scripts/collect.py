"""`mbrl collect RUN --out FILE.npz`: the records of a run, to train on them offline."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import numpy as np
import tyro

from mbrl.training.recorded import in_order, write_records
from scripts import runs
from scripts.cli import parse, run


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """Write what the replay of a run holds, one stream per environment and seed."""

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    out: str
    """File to write (.npz)."""


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(CollectConfig, argv, "mbrl collect")
    folder, out = Path(config.run), Path(config.out)
    if out.suffix != ".npz":
        raise ValueError(f"--out: got {out}, expected a file that ends in .npz")
    job = runs.load(folder)
    restored = runs.restore(job, folder)
    if restored is None:
        raise ValueError(f"{folder}: there is no save to read; train it first")
    rings = runs.learner_of(restored.tree).ring
    seeds = range(rings.size.shape[0])
    streams = [in_order(jax.tree.map(lambda x, s=s: np.asarray(x[s]), rings)) for s in seeds]
    record = jax.tree.map(lambda *leaves: np.concatenate(leaves), *streams)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_records(out, record)
    ended = int(record.is_last.sum())
    print(f"{out}: {record.reward.size} records, {ended} ended episodes of {job.env_id}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
