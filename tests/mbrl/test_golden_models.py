"""Numbers of whole models: what the trainers of TRL compute from weights and tokens."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mbrl.losses.direct_preference import direct_preference_loss, sequence_log_prob
from mbrl.losses.preference import bradley_terry_nll, centering_loss
from mbrl.models.token import token_log_probs
from mbrl.networks.transformer import Transformer, transformer
from mbrl.training.hugging_face import Checkpoint, load

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "rlhf.json").read_text("utf-8"))
SIZES = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Policy `lm`, reference `ref` and reward model `rm`."""
    found = {}
    with np.load(FOLDER / "models.npz") as data:
        for name in ("lm", "ref", "rm"):
            folder = tmp_path_factory.mktemp(name)
            part = {k.removeprefix(f"{name}."): data[k] for k in data if k.startswith(f"{name}.")}
            save_file(part, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **SIZES}))
            found[name] = load(folder, head=name == "rm")
    return found


@pytest.fixture(scope="module")
def model(models: dict[str, Checkpoint]) -> Transformer:
    net = transformer(models["lm"].config)
    return net._replace(hidden=jax.jit(net.hidden))


def golden(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    entry = GOLDEN[name]
    return {k: jnp.asarray(v) for k, v in entry["inputs"].items()}, entry["outputs"]


def scores(model: Transformer, rm: Checkpoint, tokens: Any, mask: Any) -> Any:
    """Read the reward at the last token of sequences that are padded on the right."""
    hidden = model.hidden(rm.params, tokens, mask)
    return hidden[jnp.arange(len(tokens)), mask.sum(-1) - 1] @ rm.head


def test_logits_and_scores(model: Transformer, models: dict[str, Checkpoint]) -> None:
    x, want = golden("model_parity")
    tokens, mask = x["left_ids"], x["left_ids"] != x["pad"]
    logits = model.logits(models["lm"].params, model.hidden(models["lm"].params, tokens, mask))
    total = jnp.sum(jnp.abs(logits) * mask[..., None])
    np.testing.assert_allclose(total, want["left_logits_sum_abs_nonpad"], rtol=1e-5)
    got = scores(model, models["rm"], x["right_ids"], x["right_ids"] != x["pad"])
    np.testing.assert_allclose(got, want["right_score"], atol=1e-6)
    np.testing.assert_allclose(got, want["hf_sequence_classification_logit"], atol=1e-6)


def test_losses_of_the_preference_trainer(
    model: Transformer, models: dict[str, Checkpoint]
) -> None:
    x, want = golden("dpo_trainer_model_level")
    tokens, mask = x["input_ids"], x["attention_mask"] > 0
    completion = x["completion_mask"][:, 1:] > 0

    @jax.jit
    def sequences(params: Any) -> Any:
        token = token_log_probs(model, params, tokens, mask, tokens.shape[1] - 1)
        return sequence_log_prob(token, completion)

    policy, reference = (sequences(models[name].params) for name in ("lm", "ref"))
    np.testing.assert_allclose(policy, want["policy_sequence_logps"], rtol=1e-5)
    np.testing.assert_allclose(reference, want["ref_sequence_logps"], rtol=1e-5)
    # The first half of the rows are the chosen ones.
    policy, reference, length = (
        v.reshape(2, -1).T for v in (policy, reference, completion.sum(-1))
    )
    loss = partial(direct_preference_loss, policy, reference, beta=0.1, length=length)
    for kind, value in want["loss"].items():
        got, _ = loss(kind, smoothing=0.1 if kind == "robust" else 0.0)
        np.testing.assert_allclose(got, value, rtol=1e-5, err_msg=kind)


def test_losses_of_the_reward_trainer(model: Transformer, models: dict[str, Checkpoint]) -> None:
    x, want = golden("reward_trainer_model_level")
    got = scores(model, models["rm"], x["input_ids"], x["attention_mask"] > 0)
    np.testing.assert_allclose(got, want["scores"], atol=1e-6)
    pair = got.reshape(2, -1).T
    centering = 0.01 * centering_loss(pair)
    plain = bradley_terry_nll(pair[:, 0], pair[:, 1]).mean()
    margin = bradley_terry_nll(pair[:, 0], pair[:, 1], x["margin"]).mean()
    np.testing.assert_allclose(plain + centering, want["loss_center"], rtol=1e-5)
    np.testing.assert_allclose(margin + centering, want["loss_center_margin"], rtol=1e-5)
