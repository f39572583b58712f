"""Several devices compute what one does, in a process that has four."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json
import jax, numpy as np
from agents.rlhf.supervised import SupervisedGiven, make_supervised
from mbrl.networks.transformer import family_config, transformer
from mbrl.parallel import make_mesh, shard_params, shard_rows
from mbrl.text_batches import SupervisedBatch

config = family_config("qwen3", vocab=12, layers=1, width=16, heads=4, kv_heads=2, max_length=8)
model = transformer(config)
stage = make_supervised(model)
given = SupervisedGiven(model.init(jax.random.key(0)))
tokens = np.arange(32).reshape(8, 4) % 12
batch = SupervisedBatch(tokens, tokens >= 0, tokens > 3)
state = jax.jit(stage.init)(jax.random.key(2), given)
found = []
for shape in ((1, 1), (2, 2)):
    mesh = make_mesh(*shape)
    parts = shard_params(state, mesh), shard_params(given, mesh), shard_rows(batch, mesh)
    new, metrics = jax.jit(stage.step)(*parts, jax.random.key(3))
    kernel = new.weights["blocks"]["up"]["kernel"]
    found.append({
        "loss": float(metrics["loss"]), "norm": float(metrics["gradient_norm"]),
        "weights": np.asarray(kernel).ravel()[:50].tolist(),
        "part": list(kernel.addressable_shards[0].data.shape), "whole": list(kernel.shape),
    })
print(json.dumps(found))
try:
    make_mesh(3, 2)
except ValueError as error:
    print(error)
try:
    shard_rows(np.zeros((7, 2)), make_mesh(2))
except ValueError as error:
    print(error)
"""


CUT = """
import json, pathlib, shutil, sys
import jax, numpy as np
from scripts import cli, rlhf_jobs
from scripts.rlhf_models import load_model
from scripts.rlhf_stage import CHECKPOINTS, LoopConfig

root = pathlib.Path(sys.argv[1])
assert cli.main(["rlhf", "data", "--out", str(root / "data")]) == 0
shape = ["--architecture.layers", "1", "--architecture.width", "16", "--architecture.heads", "4"]
argv = ["--tokenizer", str(root / "data"), "--out", str(root / "base")]
assert cli.main(["rlhf", "new", *argv, *shape]) == 0

def trained():
    rlhf_jobs.supervised(rlhf_jobs.SupervisedJob(
        str(root / "data/train/demonstrations.jsonl"), str(root / "base"), str(root / "sft"),
        rlhf_jobs.TextConfig(6, 16),
        LoopConfig(steps=4, batch_size=8, save_every=2, tensorboard=False, data_devices=2,
                   tensor_devices=2),
    ))
    return (root / "sft/model/model.safetensors").read_bytes()

whole = trained()
# As a kill between updates 2 and 4 leaves it.
shutil.rmtree(root / "sft" / CHECKPOINTS / "step_000000004")
shutil.rmtree(root / "sft/model")
again = trained()
old, new = (jax.tree.leaves(load_model(str(root / name)).params) for name in ("base", "sft"))
learned = max(float(np.abs(a - b).max()) for a, b in zip(old, new))
print(json.dumps({"same": again == whole, "learned": learned}))
"""


def four_devices(program: str, *argv: str) -> list[str]:
    """Run a program in a process with four devices; the lines that it prints."""
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *argv],
        env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_step_on_four_devices_is_that_of_one() -> None:
    lines = four_devices(PROGRAM)
    one, four = json.loads(lines[0])
    for name in ("loss", "norm"):
        assert abs(one[name] - four[name]) < 1e-4
    assert max(abs(a - b) for a, b in zip(one["weights"], four["weights"], strict=True)) < 1e-5
    # Columns of the hidden layer lie on two devices.
    assert one["part"] == one["whole"]
    assert four["part"] == [*four["whole"][:-1], four["whole"][-1] // 2]
    assert "got data=3, tensor=2, expected at least 1 each and at most 4 together" in lines[1]
    assert "shape (7, 2), expected rows that divide by the 2 devices" in lines[2]


def test_a_stage_on_four_devices_goes_on_to_the_bit_where_it_was_cut(tmp_path: Path) -> None:
    found = json.loads(four_devices(CUT, str(tmp_path))[-1])
    assert found["same"]
    assert found["learned"] > 1e-4
