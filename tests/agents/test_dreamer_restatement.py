"""The whole loss of Dreamer again: slow loops in float64, written from the publication.

The library and the restatement share parameters, records and random numbers; every term of
the loss must agree, and the gradient of the sum.

Central differences cannot see a stop-gradient: what is stopped moves with the parameters.
So the restatement passes all that is stopped through a `Tape`, which keeps the values of an
undisturbed run and returns them whatever the parameters are now. Differences of that
function are derivatives with stop-gradients; a straight-through sample is the kept one-hot
plus the probabilities minus the kept probabilities.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.dreamer import DreamerConfig, DreamerState, Parts, Weights, total_loss
from agents.dreamer_loss import LatentConfig
from mbrl.models.rssm import Statistics
from mbrl.models.rssm_networks import stochastic
from mbrl.normalization import Moments, ReturnScale
from mbrl.policies import Policy
from mbrl.types import EnvSpec
from tests.agents.tiny import ARM, RICH, SIMPLE, SIZE, TINY, tiny_parts
from tests.mbrl import plain
from tests.mbrl.sequences import edited, random_records

B, T, H = 3, 5, 3
KEY = jax.random.key(11)
CONFIGS = {
    "simple": (SIMPLE, dataclasses.replace(TINY, horizon=H, length=T, entropy=0.05)),
    "rich": (
        RICH,
        dataclasses.replace(
            TINY, horizon=H, length=T, entropy=0.05, latent=LatentConfig("gaussian"), members=2,
            penalty=0.5, free_nats=8.0,
        ),
    ),
}  # fmt: skip


class Case(NamedTuple):
    spec: EnvSpec
    config: DreamerConfig
    parts: Parts
    state: DreamerState
    record: Any
    valid: Any
    evaluate: Callable[..., Any]
    """`(weights, state, record, valid, key) -> ((loss, Found), gradient)`."""


class Tape:
    """Values without a gradient: kept at the first run, repeated at all others."""

    def __init__(self) -> None:
        self._kept: list[Any] = []
        self._position: int | None = None

    def __call__(self, compute: Callable[[], Any]) -> Any:
        if self._position is None:
            self._kept.append(compute())
            return self._kept[-1]
        self._position += 1
        return self._kept[self._position - 1]

    def rewind(self) -> None:
        self._position = 0


def heads_in_reach(weights: Weights) -> Weights:
    """Centre reward and value on numbers around 1, and survival around the discount.

    Random logits over 255 bins would mean values of the size of the largest, 5e8.
    """
    centres = jnp.linspace(-20.0, 20.0, 255)

    def centred(layer: Any, at: float) -> Any:
        return {**layer, "bias": layer["bias"] - 2.0 * jnp.square(centres - at)}

    model = dict(weights.model)
    model["reward"] = {
        **model["reward"], "Dense_1": centred(model["reward"]["Dense_1"], 0.2)
    }  # fmt: skip
    model["survival"]["Dense_1"]["bias"] = jnp.full(1, 5.5)
    value = {**weights.value, "Dense_3": centred(weights.value["Dense_3"], 0.5)}
    return weights._replace(model=model, value=value)


@functools.cache
def case(name: str) -> Case:
    spec, config = CONFIGS[name]
    parts = tiny_parts(spec, config)
    feature = jax.ShapeDtypeStruct(
        (1, parts.model.feature(parts.model.begin(1)).shape[-1]), jnp.float32
    )
    shapes = jax.eval_shape(parts.model.init, KEY)
    heads = [jax.eval_shape(net.init, KEY, feature) for net in (parts.policy_net, parts.value_net)]
    weights = heads_in_reach(plain.random_weights(Weights(shapes.weights, *heads), 1, gain=1.5))
    slow = heads_in_reach(plain.random_weights(Weights(shapes.weights, *heads), 2)).value
    size = shapes.statistics.observations.mean.shape[0]
    seen = Moments(jnp.linspace(-0.5, 0.5, size), jnp.linspace(0.3, 4.0, size), jnp.float32(9.0))
    rewards = Moments(jnp.float32(0.3), jnp.float32(2.25), jnp.float32(9.0))
    scale = ReturnScale(jnp.float32(-1.5), jnp.float32(2.5))
    state = DreamerState(weights, slow, Statistics(seen, rewards), scale, ())
    packed = jax.eval_shape(lambda: parts.model.pack(parts.model.begin(1)))
    record = random_records(spec, packed, (B, T + 1), seed=4)
    # An episode that ends by itself, one at its time limit, one that a fault cuts short.
    record = edited(record, ([0, 1], [2, 3]), "is_last")
    record = edited(record, (0, 2), "is_terminal")
    record = edited(record, ([0, 1, 2], [3, 4, 2]), "is_first")
    loss = functools.partial(total_loss, parts, config)
    evaluate = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return Case(spec, config, parts, state, record, np.ones((B, T + 1), bool), evaluate)


def seen_by(it: Case, obs: Any) -> tuple[Any, Any]:
    """Return the vector [N, D] and the image that the networks see of observations [N]."""
    moments = plain.as_float64(it.state.statistics.observations)
    mean, std = moments.mean, np.sqrt(moments.var)
    if it.spec is SIMPLE:
        return plain.symlog((obs - mean) / std), None
    speed = plain.symlog((obs["speed"] - mean[3:]) / std[3:])
    return np.concatenate([np.eye(3)[obs["place"]], speed], -1), obs["camera"] / 255.0


def encoded(it: Case, action: Any) -> Any:
    if it.spec is SIMPLE:
        return np.eye(3)[action]
    arm = 2.0 * (action["arm"] - ARM.low) / (ARM.high - ARM.low) - 1.0
    gear = np.eye(2)[action["gear"][..., 0]], np.eye(3)[action["gear"][..., 1]]
    return np.concatenate([arm, *gear, np.eye(2)[action["tool"]]], -1)


def policy_parts(it: Case, outputs: Any) -> list[Any]:
    """List what the action consists of: ('normal', mean, std) or ('choice', probs, None)."""
    found, sizes = [], [3]
    if it.spec is RICH:
        mean, raw, outputs = np.split(outputs, [2, 4], -1)
        found.append(("normal", np.tanh(mean), 0.9 * plain.sigmoid(raw + 2.0) + 0.1))
        sizes = [2, 3, 2]
    for logits in np.split(outputs, np.cumsum(sizes)[:-1], -1):
        found.append(("choice", plain.unimix(logits, 0.01), None))
    return found


def density(parts: list[Any], action: Any) -> tuple[Any, Any]:
    """Return the log-probability of actions [N, A] and the entropy, [N]."""
    log_prob, entropy = np.zeros(len(action)), np.zeros(len(action))
    for kind, one, std in parts:
        x, action = np.split(action, [one.shape[-1]], -1)
        if kind == "normal":
            log_prob -= (0.5 * ((x - one) / std) ** 2 + np.log(std)).sum(-1)
            log_prob -= 0.5 * math.log(2 * math.pi) * x.shape[-1]
            entropy += (np.log(std) + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
        else:
            log_prob += np.log((one * x).sum(-1))
            entropy -= (one * np.log(one)).sum(-1)
    return log_prob, entropy


def latent_law(it: Case, outputs: Any) -> Any:
    """Return the probabilities [N, S, C], or mean and deviation [N, S]."""
    if it.spec is SIMPLE:
        return plain.unimix(outputs.reshape(len(outputs), 3, 4), SIZE.unimix)
    mean, raw = np.split(outputs, 2, -1)
    return np.stack([mean, plain.softplus(raw) + 0.1])


def latent_sample(it: Case, law: Any, noise: Any, stop: Tape) -> Any:
    if it.spec is not SIMPLE:
        return law[0] + law[1] * noise
    index = (noise[..., None] >= np.cumsum(law, -1)[..., :-1]).sum(-1)
    hot, probs = stop(lambda: np.eye(4)[index]), stop(lambda: law.copy())
    return (hot + law - probs).reshape(len(law), -1)


def divergence(it: Case, p: Any, q: Any) -> Any:
    """Return the divergence summed over all latents of a state, [N]."""
    if it.spec is SIMPLE:
        return (p * np.log(p / q)).sum((-1, -2))
    square = (p[1] ** 2 + (p[0] - q[0]) ** 2) / (2 * q[1] ** 2)
    return (np.log(q[1] / p[1]) + square - 0.5).sum(-1)


def noise_of(it: Case, key: Any, lead: tuple[int, ...]) -> Any:
    law = stochastic(dataclasses.replace(SIZE, classes=0) if it.spec is RICH else SIZE)
    return np.asarray(law.noise(key, lead), np.float64)


def members(p: Any, feature: Any, action: Any) -> Any:
    """Return the predictions of both members, [2, N, Z + 1]."""
    x = np.concatenate([feature, action], -1)
    return np.stack([plain.mlp(jax.tree.map(lambda leaf: leaf[n], p), x) for n in range(2)])


def survival_of(it: Case, logit: Any) -> Any:
    return np.minimum(plain.sigmoid(logit) / it.config.discount, 1.0)


def world_model(it: Case, model: Any, key: Any, stop: Tape) -> tuple[Any, Any, dict[str, float]]:
    """Return the posteriors [B][T] and the means of the terms of the model's loss."""
    record, config = it.record, it.config
    action = encoded(it, record.action)
    deter, stoch = plain.as_float64((record.extras["deter"][:, 0], record.extras["stoch"][:, 0]))
    if it.spec is SIMPLE:
        stoch = np.eye(4)[record.extras["stoch"][:, 0]].reshape(B, -1)
    noise = stop(lambda: noise_of(it, key, (T, B)))
    total: dict[str, Any] = {}
    deters, stochs = np.zeros((B, T, deter.shape[1])), np.zeros((B, T, stoch.shape[1]))

    def add(name: str, x: Any) -> None:
        assert np.shape(x) == (B,)
        total[name] = total.get(name, 0.0) + np.sum(x) / (B * T)

    for t in range(1, T + 1):
        keep = 1.0 - record.is_first[:, t, None]
        vector, image = seen_by(it, jax.tree.map(lambda x: x[:, t], record.obs))
        deter = plain.gru(model["core"], deter * keep, stoch * keep, action[:, t - 1] * keep)
        tokens = plain.mlp(model["encoder"]["MLP_0"], vector)
        if image is not None:
            image_tokens = plain.conv_encoder(model["encoder"]["ConvEncoder_0"], image - 0.5)
            tokens = np.concatenate([image_tokens, tokens], -1)
        posterior = latent_law(it, plain.posterior(model["posterior"], deter, tokens))
        stoch = latent_sample(it, posterior, noise[t - 1], stop)
        deters[:, t - 1], stochs[:, t - 1] = deter, stoch
        feature = np.concatenate([deter, stoch], -1)

        prior = latent_law(it, plain.mlp(model["prior"], deter))
        fixed = [stop(lambda x=x: x.copy()) for x in (posterior, prior)]
        add("dynamics", np.maximum(divergence(it, fixed[0], prior), config.free_nats))
        other = np.maximum(divergence(it, posterior, fixed[1]), config.free_nats)
        add("representation", 0.1 * other)

        said = plain.mlp(model["decoder"]["MLP_0"], feature)
        said = plain.dense(model["decoder"]["Dense_0"], said)
        numbers = 0 if it.spec is SIMPLE else 3
        error = ((said[:, numbers:] - vector[:, numbers:]) ** 2).sum(-1)
        if image is not None:
            error = error - (vector[:, :3] * plain.log_softmax(said[:, :3])).sum(-1)
            sizes = [(3, 2), (5, 4)]
            drawn = plain.conv_decoder(model["decoder"]["ConvDecoder_0"], sizes, deter, stoch)
            error = error + ((drawn - image) ** 2).sum((1, 2, 3))
        add("reconstruction", error)
        add("reward", plain.two_hot_nll(plain.mlp(model["reward"], feature), record.reward[:, t]))
        logit = plain.mlp(model["survival"], feature)[:, 0]
        alive = config.discount * (1.0 - record.is_terminal[:, t])
        add("survival", plain.softplus(logit) - alive * logit)
        if config.members and t > 1:
            follows = ~record.is_last[:, t - 1] & ~record.is_first[:, t]
            before = stop(lambda: np.concatenate([deters[:, t - 2], stochs[:, t - 2]], -1))
            rewards = plain.as_float64(it.state.statistics.rewards)
            reward = (record.reward[:, t, None] - rewards.mean) / rewards.var**0.5
            target = stop(lambda: np.concatenate([stoch, reward], -1))
            guess = members(model["ensemble"], before, action[:, t - 1])
            add("ensemble", follows * ((guess - target) ** 2).sum((0, -1)))
    return deters, stochs, total


class Imagined(NamedTuple):
    feature: list[Any]
    action: list[Any]
    reward: list[Any]
    discount: list[Any]
    root: Any
    clipped: Any
    """Share of survivals that the discount would have pushed beyond 1."""


def dream(it: Case, weights: Weights, key: Any, deter: Any, stoch: Any) -> Imagined:
    """Follow the policy for H steps from every posterior, with the reward less its penalty."""
    model, config = weights.model, it.config
    feature = np.concatenate([deter, stoch], -1)
    logits = plain.mlp(model["survival"], feature)[:, 0]
    found = Imagined([feature], [], [], [], config.discount * survival_of(it, logits), [])
    for step in jax.random.split(key, H):
        act_key, step_key = jax.random.split(step)
        outputs = jnp.asarray(plain.mlp(weights.policy, feature), jnp.float32)
        action = np.float64(Policy(it.spec.action, outputs).sample(act_key))
        deter = plain.gru(model["core"], deter, stoch, action)
        law = latent_law(it, plain.mlp(model["prior"], deter))
        stoch = latent_sample(it, law, noise_of(it, step_key, (len(deter),)), Tape())
        reward = np.zeros(len(deter))
        if config.members:
            bounded = np.clip(action, -1.0, 1.0)
            var = members(model["ensemble"], feature, bounded).var(0)
            std = float(it.state.statistics.rewards.var) ** 0.5
            reward -= config.penalty * np.sqrt(var[:, :-1].mean(-1) + var[:, -1]) * std
        feature = np.concatenate([deter, stoch], -1)
        reward += plain.two_hot_mean(plain.mlp(model["reward"], feature))
        logit = plain.mlp(model["survival"], feature)[:, 0]
        found.clipped.append(plain.sigmoid(logit) > config.discount)
        found.feature.append(feature)
        found.action.append(action)
        found.reward.append(reward)
        found.discount.append(config.discount * survival_of(it, logit))
    return found


def critic_loss(logits: Any, target: Any, slow: Any, weight: Any) -> Any:
    """Return the weighted error [N] of the critic: returns, and what the slow critic says."""
    return weight * (plain.two_hot_nll(logits, target) + plain.two_hot_nll(logits, slow))


def slow_value(it: Case, feature: Any) -> Any:
    return plain.two_hot_mean(plain.mlp(plain.as_float64(it.state.slow_value), feature))


def actor_critic(
    it: Case, weights: Weights, imagined: Imagined, stop: Tape
) -> tuple[Any, dict[str, float]]:
    config, number = it.config, B * T

    def targets() -> Any:
        values = [plain.two_hot_mean(plain.mlp(weights.value, x)) for x in imagined.feature]
        returns, weight = np.zeros((H + 1, number)), np.zeros((H, number))
        returns[H] = values[H]
        for t in reversed(range(H)):
            mixed = (1 - config.lambda_) * values[t + 1] + config.lambda_ * returns[t + 1]
            returns[t] = imagined.reward[t] + imagined.discount[t] * mixed
        reached = imagined.root
        for t in range(H):
            weight[t] = reached
            reached = reached * imagined.discount[t]
        return np.array(values), returns[:H], weight

    values, returns, weight = stop(targets)
    low, high = np.percentile(returns, 5), np.percentile(returns, 95)
    old = plain.as_float64(it.state.scale)
    low, high = 0.99 * old.low + 0.01 * low, 0.99 * old.high + 0.01 * high
    scale = max(1.0, high - low)
    total: dict[str, float] = {"actor": 0.0, "entropy": 0.0, "critic": 0.0}
    for t in range(H):
        feature = imagined.feature[t]
        law = policy_parts(it, plain.mlp(weights.policy, feature))
        log_prob, entropy = density(law, imagined.action[t])
        gain = log_prob * (returns[t] - values[t]) / scale + config.entropy * entropy
        total["actor"] -= (weight[t] * gain).sum() / (H * number)
        total["entropy"] += entropy.sum() / (H * number)
        logits, slow = plain.mlp(weights.value, feature), slow_value(it, feature)
        total["critic"] += critic_loss(logits, returns[t], slow, weight[t]).sum() / (H * number)
    total |= {"value": values.mean(), "return": returns.mean(), "scale": scale}
    return returns[0].reshape(B, T), total


def replayed(
    it: Case, weights: Weights, deters: Any, stochs: Any, beyond: Any, stop: Tape
) -> float:
    """Return the critic's loss on the recorded rewards, whose gradient reaches the model."""
    record, config, total = it.record, it.config, 0.0
    for b in range(B):
        running = beyond[b, T - 1]
        for t in reversed(range(1, T)):  # from record t to record t + 1
            goes_on = t + 1 == T or not (record.is_last[b, t + 1] or record.is_first[b, t + 2])
            trace = config.lambda_ if goes_on else 0.0
            after = (1 - trace) * beyond[b, t] + trace * running
            alive = config.discount * (1.0 - record.is_terminal[b, t + 1])
            running = record.reward[b, t + 1] + alive * after
            valid = not record.is_last[b, t] and not record.is_first[b, t + 1]
            feature = np.concatenate([deters[b, t - 1], stochs[b, t - 1]])[None]
            slow = stop(lambda: slow_value(it, feature))
            logits = plain.mlp(weights.value, feature)
            total += float(valid) * critic_loss(logits, [running], slow, 1.0)[0] / (B * (T - 1))
    return total


def restated(it: Case, weights: Weights, stop: Tape) -> dict[str, Any]:
    """Return the loss, its terms and what else the agent reports."""
    model_key, dream_key = stop(lambda: jax.random.split(KEY))
    deters, stochs, model = world_model(it, weights.model, model_key, stop)
    rows = B * T
    imagined = stop(
        lambda: dream(it, weights, dream_key, deters.reshape(rows, -1), stochs.reshape(rows, -1))
    )
    beyond, heads = actor_critic(it, weights, imagined, stop)
    replay = replayed(it, weights, deters, stochs, beyond, stop)
    loss = sum(model.values()) + heads["actor"] + heads["critic"]
    found = {f"model/{name}": x for name, x in model.items()}
    return found | {
        "loss": loss + it.config.replay_value * replay,
        "actor/loss": heads["actor"],
        "actor/entropy": heads["entropy"],
        "critic/loss": heads["critic"],
        "critic/replay_loss": replay,
        "critic/value": heads["value"],
        "critic/return": heads["return"],
        "critic/return_scale": heads["scale"],
        "posteriors": (deters, stochs),
        "dream": imagined,
    }


@functools.cache
def library(name: str) -> Any:
    it = case(name)
    (loss, found), slopes = it.evaluate(it.state.weights, it.state, it.record, it.valid, KEY)
    return loss, found, slopes


@functools.cache
def recorded(name: str) -> tuple[Tape, dict[str, Any]]:
    stop = Tape()
    return stop, restated(case(name), plain.as_float64(case(name).state.weights), stop)


NAMES = list(CONFIGS)


@pytest.mark.parametrize("name", NAMES)
def test_every_term_of_the_loss_is_the_restated_one(name: str) -> None:
    loss, found, _ = library(name)
    _, expected = recorded(name)
    for term, value in expected.items():
        if term not in ("posteriors", "dream"):
            np.testing.assert_allclose(
                found.metrics[term], value, rtol=1e-5, atol=1e-6, err_msg=term
            )
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    for got, x in zip(found.latent, expected["posteriors"], strict=True):
        np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_such_that_every_branch_is_taken(name: str) -> None:
    it, (_, found) = case(name), recorded(name)
    imagined = found["dream"]
    clipped = np.mean(imagined.clipped)
    assert 0.0 < clipped < 1.0, "all survivals are on one side of the discount"
    assert len(imagined.action) == H and len(imagined.feature) == H + 1
    assert found["critic/return_scale"] > 1.0
    floor = it.config.free_nats
    assert found["model/dynamics"] > 1.02 * floor
    assert np.std(imagined.reward) > 0.03 and np.std(imagined.root) > 1e-3
    assert np.unique(np.round(imagined.action[0], 6), axis=0).shape[0] > 2


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_taught(name: str) -> None:
    _, _, slopes = library(name)
    for path, slope in jax.tree.leaves_with_path(slopes):
        assert np.isfinite(slope).all() and np.any(slope), jax.tree_util.keystr(path)


def groups(weights: Weights) -> list[str]:
    return [*(f"model/{name}" for name in weights.model), "policy", "value"]


def moved(weights: Weights, group: str, direction: Any, by: float) -> Weights:
    """Move one group of the parameters along a direction."""

    def move(tree: Any) -> Any:
        return jax.tree.map(lambda x, d: x + by * d, tree, direction)

    if not group.startswith("model/"):
        return weights._replace(**{group: move(getattr(weights, group))})
    name = group.removeprefix("model/")
    return weights._replace(model={**weights.model, name: move(weights.model[name])})


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_the_restated_loss(name: str) -> None:
    it, (stop, _) = case(name), recorded(name)
    slopes = plain.as_float64(library(name)[2])
    weights, rng = plain.as_float64(it.state.weights), np.random.default_rng(0)
    for group in groups(weights):
        part = slopes.model[group[6:]] if group.startswith("model/") else getattr(slopes, group)
        # Not any direction: a random one is nearly orthogonal to the gradient, and what is
        # wrong with it would not show. Half of it goes along with the gradient.
        size = math.sqrt(sum((x**2).sum() for x in jax.tree.leaves(part)))
        noise = jax.tree.map(lambda x: rng.normal(size=x.shape), part)
        norm = math.sqrt(sum((x**2).sum() for x in jax.tree.leaves(noise)))
        direction = jax.tree.map(lambda x, n: x / size + n / norm, part, noise)
        ends = []
        for by in (1e-5, -1e-5):
            stop.rewind()
            ends.append(restated(it, moved(weights, group, direction, by), stop)["loss"])
        products = jax.tree.map(lambda x, d: (x * d).sum(), part, direction)
        got = sum(jax.tree.leaves(products))
        np.testing.assert_allclose(got, (ends[0] - ends[1]) / 2e-5, rtol=1e-4, err_msg=group)


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_data_teach_nothing(name: str) -> None:
    it = case(name)
    valid = it.valid.copy()
    valid[2, 4:] = False
    found = []
    for fields in ((), ("obs", "action", "reward", "is_terminal", "is_last")):
        record = edited(it.record, (2, slice(4, None)), *fields)
        _, seen = it.evaluate(it.state.weights, it.state, record, valid, KEY)[0]
        found.append(seen.metrics)
    one, two = found
    for term in ("model/reconstruction", "critic/loss", "critic/replay_loss", "actor/loss"):
        # A hundredth of the percentiles of the returns may come from anywhere.
        rtol = 1e-2 if term == "actor/loss" else 1e-5
        np.testing.assert_allclose(one[term], two[term], rtol=rtol, err_msg=term)
