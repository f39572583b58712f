"""The cart-pole swing-up against mechanics."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.ondevice import cartpole_swingup as swingup

MDP = swingup.make()
FREE = swingup.DEFAULT._replace(friction=0.0)
KEY = jax.random.key(0)
STEP = jax.jit(MDP.step)


def lagrangian(q, qd, params):
    """Kinetic minus potential energy; the rod by two-point Gauss quadrature (exact here)."""
    nodes = 0.5 * params.length * (1.0 + jnp.array([-1.0, 1.0]) / jnp.sqrt(3.0))
    vx = qd[0] + nodes * jnp.cos(q[1]) * qd[1]
    vy = -nodes * jnp.sin(q[1]) * qd[1]
    kinetic = 0.5 * params.cart_mass * qd[0] ** 2
    kinetic += 0.25 * params.pole_mass * jnp.sum(vx**2 + vy**2)
    return kinetic - params.pole_mass * params.gravity * 0.5 * params.length * jnp.cos(q[1])


def euler_lagrange(y, force, params):
    """Accelerations from d/dt dL/dq' - dL/dq = generalized force."""
    q, qd = y[jnp.array([0, 2])], y[jnp.array([1, 3])]
    mass = jax.hessian(lagrangian, 1)(q, qd, params)
    mixed = jax.jacobian(jax.grad(lagrangian, 1), 0)(q, qd, params)
    push = jnp.array([force - params.friction * qd[0], 0.0])
    qdd = jnp.linalg.solve(mass, push + jax.grad(lagrangian)(q, qd, params) - mixed @ qd)
    return jnp.array([qd[0], qdd[0], qd[1], qdd[1]])


def test_equations_of_motion_follow_from_the_lagrangian():
    params = swingup.SwingUpParams(cart_mass=0.7, pole_mass=0.3, length=0.8, friction=0.2)
    y = jax.random.normal(KEY, (64, 4)) * jnp.array([1.0, 2.0, 2.0, 5.0])
    force = 10.0 * jax.random.normal(jax.random.key(1), (64,))
    expected = jax.jit(jax.vmap(lambda y, f: euler_lagrange(y, f, params)))(y, force)
    np.testing.assert_allclose(
        swingup.acceleration(params, y, force), expected, rtol=1e-4, atol=1e-3
    )


@jax.jit
def energy(params, s):
    q, qd = jnp.stack([s.position, s.angle], -1), jnp.stack([s.velocity, s.spin], -1)
    still = jnp.zeros(2)
    potential = -jax.vmap(lambda q: lagrangian(q, still, params))(q)
    return jax.vmap(lambda q, qd: lagrangian(q, qd, params))(q, qd) + 2 * potential


@functools.partial(jax.jit, static_argnums=1)
def coast(params, steps):
    """Let the pole swing freely; returns the first and the last state."""
    start = swingup.SwingUpState(
        jnp.zeros(3), jnp.array([0.0, 0.5, -0.5]), jnp.array([0.5, 1.5, 2.5]), jnp.zeros(3)
    )
    action = jnp.zeros((3, 1))

    def step(state, _):
        return MDP.step(params, KEY, state, action)[0], None

    end, _ = jax.lax.scan(step, start, None, length=steps)
    return start, end


def test_energy_is_conserved_to_fourth_order_in_the_time_step():
    drift = []
    for dt in (0.04, 0.02):
        params = FREE._replace(dt=dt)
        start, end = coast(params, round(1.2 / dt))
        drift.append(np.abs(energy(params, end) - energy(params, start)).max())
    assert drift[0] < 2e-2
    assert drift[1] < drift[0] / 8


def test_momentum_along_the_rail_is_conserved_without_forces():
    start, end = coast(FREE, 30)

    def momentum(s):
        arm = 0.5 * FREE.pole_mass * FREE.length * jnp.cos(s.angle) * s.spin
        return (FREE.cart_mass + FREE.pole_mass) * s.velocity + arm

    np.testing.assert_allclose(momentum(end), momentum(start), atol=1e-3)


@pytest.mark.parametrize(
    ("x", "angle", "action", "reward"),
    [
        (0.0, 0.0, 0.0, 1.0),
        (0.0, np.pi, 0.0, np.exp(-4.0)),
        (0.6, 0.0, 0.0, np.exp(-1.0)),
        (-0.6, np.pi / 2, 0.0, np.exp(-1.0)),
    ],
)
def test_reward_of_a_state_reached(x, angle, action, reward):
    params = swingup.DEFAULT._replace(gravity=0.0)
    state = swingup.SwingUpState(*(jnp.array([v]) for v in (x, 0.0, angle, 0.0)))
    _, outcome = STEP(params, KEY, state, jnp.array([[action]]))
    np.testing.assert_allclose(outcome.reward[0], reward, rtol=1e-5)
    assert outcome.discount[0] == 1.0


def test_an_action_costs_a_hundredth_of_its_square():
    params = swingup.DEFAULT._replace(force=0.0, gravity=0.0)
    state = swingup.SwingUpState(*(jnp.zeros(2) for _ in range(4)))
    _, outcome = STEP(params, KEY, state, jnp.array([[0.0], [-0.5]]))
    np.testing.assert_allclose(outcome.reward, [1.0, 0.9975], rtol=1e-6)


def test_the_cart_stops_dead_at_the_rail():
    state = swingup.SwingUpState(
        jnp.array([2.9, -2.9]), jnp.array([9.0, -9.0]), jnp.zeros(2), jnp.zeros(2)
    )
    new, _ = STEP(None, KEY, state, jnp.array([[1.0], [-1.0]]))
    np.testing.assert_array_equal(new.position, [3.0, -3.0])
    np.testing.assert_array_equal(new.velocity, [0.0, 0.0])
    away, _ = STEP(None, KEY, new._replace(spin=jnp.zeros(2)), jnp.array([[-1.0], [1.0]]))
    assert np.all(np.abs(away.position) < 3.0)


def test_trials_start_hanging_still():
    state = MDP.init(None, KEY, batch=500)
    np.testing.assert_allclose(np.cos(state.angle), -1.0, atol=0.03)
    for leaf in (state.position, state.velocity, state.spin):
        assert abs(float(jnp.std(leaf)) - 0.05) < 0.01
