"""A reward model from pairwise comparisons, and what becomes of whoever believes in it.

People cannot say how good an answer is, but which of two they like better. A network gives every
answer a score; the difference of two scores is the log-odds of the preference (Bradley-Terry).
"""

import jax
import jax.numpy as jnp
import optax

from mbrl.losses.preference import bradley_terry_nll
from mbrl.networks.core import mlp
from mbrl.preferences.evaluation import accuracy, expected_calibration_error


def true_reward(x):
    """What people want and nobody can write down: more of the first thing, but not too much."""
    return 2.0 * x[..., 0] - 4.0 * jax.nn.relu(x[..., 0] - 2.0) ** 2 + jnp.sin(2.0 * x[..., 1])


def compare(key, count):
    """Draw pairs of answers [count, 2, 4] and put the preferred one first."""
    draw_key, label_key = jax.random.split(key)
    pair = jax.random.normal(draw_key, (count, 2, 4))
    reward = true_reward(pair)
    first = jax.random.bernoulli(label_key, jax.nn.sigmoid(reward[:, 0] - reward[:, 1]))
    return jnp.where(first[:, None, None], pair, pair[:, ::-1])


# 1. A model: an answer, here four numbers [..., 4], gets a score [...].
network = mlp((64, 64), 1)
params = network.init(jax.random.key(0), jnp.zeros((1, 4)))


def score(params, x):
    return network.apply(params, x)[..., 0]


# 2. The loss: -log sigmoid(score of the preferred one - score of the other).
def loss(params, pair):
    return bradley_terry_nll(score(params, pair[:, 0]), score(params, pair[:, 1])).mean()


def step(carry, rows):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params, train[rows])
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value


train, held_out = compare(jax.random.key(1), 4000), compare(jax.random.key(2), 4000)
optimizer = optax.adam(3e-3)
order = jax.random.randint(jax.random.key(3), (300, 128), 0, len(train))
start = params, optimizer.init(params)
(params, _), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, order))(start)
print(f"loss: {losses[0]:.3f} at first, {losses[-50:].mean():.3f} at last")

# 3. What it has learned: held-out comparisons, how sure it may be, and an order.
scores, rank = score(params, held_out), jnp.tile(jnp.arange(2), (len(held_out), 1))
best = accuracy(true_reward(held_out), rank)
print(f"held-out accuracy: {accuracy(scores, rank):.3f}, that of the true reward {best:.3f}")
sure = jax.nn.sigmoid(jnp.abs(scores[:, 0] - scores[:, 1]))
error = expected_calibration_error(sure, scores[:, 0] > scores[:, 1])
print(f"calibration error: {error:.3f}")
# Single comparisons may go round in a circle; scores cannot.
ladder = jnp.zeros((5, 4)).at[:, 0].set(jnp.linspace(-2.0, 2.0, 5))
steps = ", ".join(f"{x:.1f}" for x in score(params, ladder))
print(f"five answers, each better than the one before: {steps}")

# 4. A maximizer that believes in it: where nobody has compared, the score is made up.
slope = jax.grad(lambda x: score(params, x))
climb = jax.jit(lambda n: jax.lax.fori_loop(0, n, lambda _, x: x + 0.1 * slope(x), jnp.zeros(4)))
for n in (0, 10, 20, 40):
    x = climb(n)
    print(f"{n:2d} steps uphill: learned {score(params, x):5.1f}, true {true_reward(x):6.1f}")
