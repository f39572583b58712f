"""Pursue learned rewards by the best of n, and see what the true reward makes of it.

  python scripts/best_of_n.py --out docs/results/best_of_n.json --figure docs/rlhf_best_of_n.png

The true reward ("gold") is a random transformer over short sequences of tokens, the policy draws
tokens uniformly, and learned rewards ("proxies") are smaller transformers that have seen pairs of
sequences, a quarter of them labelled the wrong way round.

Reference: Gao et al. 2022 (arXiv:2210.10760); Coste et al. 2023 (arXiv:2310.02743).
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mbrl.losses.preference import bradley_terry_nll
from mbrl.networks.transformer import Transformer, TransformerConfig, transformer
from mbrl.preferences.best_of_n import best_of_n, best_of_n_kl
from mbrl.preferences.evaluation import accuracy
from mbrl.preferences.overoptimization_fit import fit_course
from mbrl.settings import check_whole, check_within
from mbrl.training import run_directory
from mbrl.types import Array, Key, Params
from mbrl.uncertainty import risk
from scripts import best_of_n_figure, results
from scripts.cli import parse, run

RULES = ("single", "mean", "worst", "uwo")
"""How the scores of the members become one; 'single' is the mean over members of what each of
them leads to alone."""
UWO_COEF = 0.5
CHUNK = 512
"""Sequences that are scored at a time."""
SAMPLE = 4096
"""Sequences that rewards are normalized by; and pairs that accuracy is measured on."""


@dataclasses.dataclass(frozen=True)
class BestOfNConfig:
    """Pursue learned rewards by the best of n."""

    out: str
    """JSON file to write."""
    figure: str = ""
    """Figure to draw; '' = none."""
    seeds: int = 6
    """True rewards, each with data and proxies of its own."""
    first_seed: int = 0
    """The first of them."""
    members: int = 5
    """Proxies per true reward; they share the pairs, not the weights nor the order."""
    pairs: int = 1000
    """Labelled pairs."""
    flips: float = 0.25
    """Share of the labels that are wrong."""
    pool: int = 32_768
    """Sequences to choose from."""
    most: int = 1024
    """Largest n."""
    batch_size: int = 32
    """Pairs per update."""
    passes: int = 8
    """Over the pairs."""
    learning_rate: float = 1e-3
    """Step size of Adam at first; it falls to 0."""
    weight_decay: float = 0.0
    """Of AdamW, per unit of step size."""
    uniform: float = 0.0
    """Share of answers that the loss takes for random."""
    sharpness: float = 1.4
    """Deviation of the weights of the true reward, times the root of their fan-in."""

    def __post_init__(self) -> None:
        check_whole(self, "seeds", "members", "pairs", "pool", "most", "batch_size", "passes")
        check_within(self, "flips", 0, 0.5)
        check_within(self, "learning_rate", 0, ends="(]")
        if self.pool % CHUNK:
            raise ValueError(f"pool: got {self.pool}, expected a multiple of {CHUNK}")


class Variant(NamedTuple):
    """A way to train the proxies: passes over the pairs; each on a sample of them of its own."""

    passes: int
    bootstrap: bool


GOLD = transformer(TransformerConfig(vocab=32, layers=2, width=48, heads=4, max_length=16))
PROXY = transformer(TransformerConfig(vocab=32, layers=1, width=32, heads=4, max_length=16))


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(BestOfNConfig, argv, "best_of_n.py")
    start = time.perf_counter()
    variants = {
        f"{config.passes} passes": Variant(config.passes, False),
        "1 pass": Variant(1, False),
        f"{config.passes} passes, bootstrapped": Variant(config.passes, True),
    }
    studies, one = {}, jax.jit(partial(study, config))
    for name, variant in variants.items():
        seeds = [one(variant, jax.random.key(config.first_seed + i)) for i in range(config.seeds)]
        studies[name] = jax.tree.map(lambda *x: np.stack(x).astype(float), *seeds)
        alone, together = (studies[name][f"{x}_accuracy"].mean() for x in ("single", "ensemble"))
        print(f"{name}: accuracy {alone:.3f}, of the mean {together:.3f}", flush=True)
    versions = run_directory.versions()
    written = {
        "config": dataclasses.asdict(config), "seconds": time.perf_counter() - start,
        **results.origin(versions), "commit": versions.get("commit", "unknown"),
        "date": time.strftime("%Y-%m-%d"), "cores": len(os.sched_getaffinity(0)),
        "n": draws(config).tolist(), "kl": divergence(config).tolist(),
        "variants": {name: summary(config, found) for name, found in studies.items()},
    }  # fmt: skip
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    Path(config.out).write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    print(report(written))
    if config.figure:
        best_of_n_figure.draw(written, Path(config.figure))
    return 0


def draws(config: BestOfNConfig) -> np.ndarray:
    """List the n that are looked at: powers of 2."""
    return 2 ** np.arange(int(np.log2(config.most)) + 1)


def divergence(config: BestOfNConfig) -> Array:
    """Return the divergence [M], in nats, of the best of each n."""
    return best_of_n_kl(jnp.asarray(draws(config)))


def study(config: BestOfNConfig, variant: Variant, key: Key) -> dict[str, Array]:
    """Make a true reward, learn it from pairs, and pursue what was learned.

    Args:
      config: sizes.
      variant: how the proxies are trained.
      key: consumed; the same key means the same true reward, data and pool in all variants.

    Returns:
      Accuracies on clean labels, and `gold/RULE`, `proxy/RULE` [M] for every n; `gold/oracle`
      is that of the best of n by the true reward.
    """
    gold_key, pair_key, proxy_key, pool_key = jax.random.split(key, 4)
    gold = make_gold(config, gold_key)
    pairs, held_out = make_pairs(config, gold, pair_key)
    members = jax.vmap(partial(train, config, variant, pairs))(
        jax.random.split(proxy_key, config.members)
    )

    def proxies(tokens: Array) -> Array:
        return jax.vmap(score, (None, 0, None))(PROXY, members, tokens)

    base = in_chunks(proxies, draw(jax.random.fold_in(pool_key, 0), (SAMPLE,)))
    mean, std = base.mean(1, keepdims=True), base.std(1, keepdims=True)

    def normalized(tokens: Array) -> Array:
        return (in_chunks(proxies, tokens) - mean) / std

    clean = normalized(held_out.reshape(-1, held_out.shape[-1])).reshape(config.members, -1, 2)
    rank = jnp.tile(jnp.arange(2), (held_out.shape[0], 1))
    pool = draw(jax.random.fold_in(pool_key, 1), (config.pool,))
    true, learned = in_chunks(gold, pool), normalized(pool)
    found = {
        "single_accuracy": jax.vmap(accuracy, (0, None))(clean, rank).mean(),
        "ensemble_accuracy": accuracy(clean.mean(0), rank),
        "gold/oracle": best_of_n(true, true, draws(config)),
    }
    for rule in RULES:
        combined = learned if rule == "single" else risk(learned, rule, UWO_COEF)[None]
        for name, value in (("gold", true[None]), ("proxy", combined)):
            of = partial(best_of_n, n=draws(config))
            value = jnp.broadcast_to(value, combined.shape)
            found[f"{name}/{rule}"] = jax.vmap(of)(combined, value).mean(0)
    return found


def make_gold(config: BestOfNConfig, key: Key) -> Any:
    """Draw a true reward `tokens [B, T] -> [B]`, of mean 0 and deviation 1 over the policy.

    Weights of the usual size would make it nearly a function of the last token.
    """
    trunk_key, head_key, sample_key = jax.random.split(key, 3)

    def widen(path: Any, x: Array) -> Array:
        name = path[-1].key
        if name == "kernel":
            return x * (config.sharpness * x.shape[-2] ** -0.5 / x.std())
        return x / x.std() if name in ("embed", "positions") else x

    trunk = jax.tree_util.tree_map_with_path(widen, GOLD.init(trunk_key))
    params = {"trunk": trunk, "head": head(head_key, GOLD.config.width)}
    sample = score(GOLD, params, draw(sample_key, (SAMPLE,)))
    return lambda tokens: (score(GOLD, params, tokens) - sample.mean()) / sample.std()


def head(key: Key, width: int) -> Array:
    """Draw the weights [D] of a head that scores hidden states."""
    return jax.random.normal(key, (width,)) * (width + 1) ** -0.5


def score(model: Transformer, params: Params, tokens: Array) -> Array:
    """Score sequences [B, T] by the hidden state of their last token, [B]."""
    hidden = model.hidden(params["trunk"], tokens, jnp.ones(tokens.shape, bool))
    return jnp.sum(hidden[:, -1] * params["head"], -1)


def draw(key: Key, shape: tuple[int, ...]) -> Array:
    """Draw sequences [*shape, T] from the policy."""
    return jax.random.randint(key, (*shape, GOLD.config.max_length), 0, GOLD.config.vocab)


def make_pairs(config: BestOfNConfig, gold: Any, key: Key) -> tuple[Array, Array]:
    """Draw pairs [M, 2, T], labelled as better and worse; and others with clean labels."""
    keys = jax.random.split(key, 3)
    pairs, held_out = draw(keys[0], (config.pairs, 2)), draw(keys[1], (SAMPLE, 2))
    flipped = jax.random.bernoulli(keys[2], config.flips, (config.pairs,))

    def sort(pairs: Array, flipped: Array | bool) -> Array:
        true = gold(pairs.reshape(-1, pairs.shape[-1])).reshape(-1, 2)
        wrong = (true[:, 0] < true[:, 1]) ^ flipped
        return jnp.where(wrong[:, None, None], pairs[:, ::-1], pairs)

    return sort(pairs, flipped), sort(held_out, False)


def train(config: BestOfNConfig, variant: Variant, pairs: Array, key: Key) -> Params:
    """Fit one proxy to pairs; the variant may be traced, so that all share one program."""
    trunk_key, head_key, sample_key, order_key = jax.random.split(key, 4)
    width, count, size = PROXY.config.width, len(pairs), config.batch_size
    params = {"trunk": PROXY.init(trunk_key), "head": head(head_key, width)}
    sample = jax.random.randint(sample_key, (count,), 0, count)
    pairs = jnp.where(variant.bootstrap, pairs[sample], pairs)
    steps = variant.passes * (count // size)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1.0, eps=1e-5, weight_decay=config.weight_decay),
    )

    def loss(params: Params, tokens: Array) -> Array:
        better, worse = score(PROXY, params, tokens.reshape(-1, tokens.shape[-1])).reshape(-1, 2).T
        return bradley_terry_nll(better, worse, uniform=config.uniform).mean()

    def step(number: Array, carry: Any) -> Any:
        params, state = carry
        turn, place = jnp.divmod(number, count // size)
        order = jax.random.permutation(jax.random.fold_in(order_key, turn), count)
        rows = jax.lax.dynamic_slice_in_dim(order, place * size, size)
        updates, state = optimizer.update(jax.grad(loss)(params, pairs[rows]), state, params)
        rate = config.learning_rate * (1.0 - number / steps)
        updates = jax.tree.map(lambda x: rate * x, updates)
        return optax.apply_updates(params, updates), state

    start = params, optimizer.init(params)
    return jax.lax.fori_loop(0, steps, step, start)[0]


def in_chunks(fn: Any, tokens: Array) -> Array:
    """Apply `[B, T] -> [..., B]` to many sequences, a chunk at a time."""
    parts = jax.lax.map(fn, tokens.reshape(-1, min(CHUNK, len(tokens)), tokens.shape[-1]))
    return jnp.moveaxis(parts, 0, -2).reshape(*parts.shape[1:-1], -1)


def summary(config: BestOfNConfig, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Reduce the seeds: means with standard errors, fits, and comparisons within each seed."""

    def spread(values: np.ndarray) -> dict[str, Any]:
        error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0 * values[0]
        return {"mean": values.mean(0).tolist(), "error": np.asarray(error).tolist()}

    distance = jnp.sqrt(divergence(config))
    out: dict[str, Any] = {name: spread(values) for name, values in found.items()}
    for rule in RULES:
        true = found[f"gold/{rule}"]
        course = fit_course(distance, jnp.asarray(true.mean(0) - true[:, 0].mean()))
        out[f"gold/{rule}"] |= {
            "fit": {name: float(x) for name, x in course._asdict().items()},
            "best_at": int(draws(config)[true.mean(0).argmax()]),
            "fall": spread(true.max(1) - true[:, -1]),
            "over_single": spread(true[:, -1] - found["gold/single"][:, -1]),
        }
    return out


def report(written: dict[str, Any]) -> str:
    """Say what was found, a line for each variant and rule."""
    lines = [
        f"{written['seconds']:.0f} s on {written['cores']} core(s); at n = {written['n'][-1]}:"
    ]
    for name, found in written["variants"].items():
        for rule in RULES:
            true, learned = found[f"gold/{rule}"], found[f"proxy/{rule}"]
            gain, fall = true["over_single"], true["fall"]
            lines.append(
                f"{name}, {rule}: gold {true['mean'][-1]:.2f} +- {true['error'][-1]:.2f} "
                f"(best {max(true['mean']):.2f} at n = {true['best_at']}; falls by "
                f"{fall['mean']:.2f} +- {fall['error']:.2f}), proxy {learned['mean'][-1]:.2f}, "
                f"over single {gain['mean']:+.2f} +- {gain['error']:.2f}, "
                f"R^2 {true['fit']['r_squared']:.3f}"
            )
        oracle = found["gold/oracle"]["mean"][-1]
        lines.append(f"{name}: best by the true reward itself {oracle:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
