"""Several seeds of a stage of RLHF as one program, each with a folder for what it has made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agents.rlhf.stage import Stage
from mbrl.networks.transformer import TransformerConfig
from scripts import config_json
from scripts.rlhf_models import digest_of
from scripts.rlhf_stage import StageRun, run_stage


class Prepared(NamedTuple):
    """A job of one seed, ready to be trained.

    Attributes:
      run: what is trained.
      architecture: of the model that it begins with.
      save: `(state, updates) -> folder` of what has been made.
    """

    run: StageRun
    architecture: TransformerConfig
    save: Callable[[Any, int], Path]


def train(job: Any, prepare: Callable[[Any], Prepared]) -> Path:
    """Train a job in its folder, all of its seeds in one program.

    Args:
      job: configuration with `loop` and `out`. `{seed}` in its paths is the number of a seed.
      prepare: makes a job of one seed ready.

    Returns:
      The folder of what was made; with several seeds `{seed}` in it is the number of each.

    Raises:
      ValueError: when the seeds begin with models that are not alike, or a run that goes on with
        others than it was begun with.
    """
    loop, out = job.loop, Path(job.out)
    settings = config_json.to_json(job)
    del settings["loop"], settings["out"]
    seeds = range(loop.seed, loop.seed + loop.num_seeds)
    each = [prepare(_of_seed(job, seed)) for seed in seeds]
    # Folders keep their names when what is in them is trained anew.
    settings["weights_given"] = [digest_of(one.run.given) for one in each]
    if len(each) == 1:
        return each[0].save(*run_stage(each[0].run, loop, out, settings))
    first = _shape_of(each[0])
    for seed, one in zip(seeds, each, strict=True):
        if _shape_of(one) != first:
            raise ValueError(
                f"model: seed {seed} of {job.model} begins with a model of another shape than seed "
                f"{loop.seed}, expected one shape; train it alone"
            )
    state, update = run_stage(_over_seeds([one.run for one in each]), loop, out, settings)
    for k, one in enumerate(each):
        one.save(jax.tree.map(lambda x, k=k: x[k], state), update)
    return out / "seed_{seed}"


def _of_seed(job: Any, seed: int) -> Any:
    paths = {
        field.name: value.replace("{seed}", str(seed))
        for field in dataclasses.fields(job)
        if isinstance(value := getattr(job, field.name), str)
    }
    if job.loop.num_seeds > 1:
        paths["out"] = str(Path(paths["out"]) / f"seed_{seed}")
    return dataclasses.replace(job, **paths, loop=dataclasses.replace(job.loop, seed=seed))


def _shape_of(one: Prepared) -> Any:
    return one.architecture, jax.tree.map(jnp.shape, one.run.given)


def _over_seeds(runs: Sequence[StageRun]) -> StageRun:
    """Make one run of several: what they compute with has a leading [S]."""
    stage = runs[0].stage

    def batch(update: int) -> Any:
        return jax.tree.map(lambda *x: np.stack(x), *(run.batch(update) for run in runs))

    return runs[0]._replace(
        stage=Stage(jax.vmap(stage.init), jax.vmap(stage.step), jax.vmap(stage.result)),
        given=jax.tree.map(lambda *x: jnp.stack(x), *(run.given for run in runs)),
        batch=batch,
    )
