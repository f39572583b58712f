"""Tree search over any `MDP`, with mctx as the engine: Gumbel MuZero and PUCT.

mctx grows the tree. Here is what it leaves out: Box actions as sampled candidates, masks inside
the tree, models that leave the finite numbers, deterministic evaluation in the program that also
explores, and the adapter that plans with a model of one's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import mctx

from mbrl import spaces
from mbrl.planning.candidates import propose
from mbrl.planning.config import PlannerConfig, SearchConfig
from mbrl.planning.score import Prior, Value
from mbrl.planning.tree import HUGE, MASKED, Node, gumbel, puct
from mbrl.types import (
    MDP,
    Array,
    Box,
    Discrete,
    EnvSpec,
    Key,
    Metrics,
    Params,
    Planner,
    Predictor,
    State,
)

Legal = Callable[[Params, State], Array]
"""`(params, state) -> [B, A]` bool, the Discrete actions that exist in a state."""

# Type checkers cannot read chex dataclasses.
_mctx: Any = mctx


class Found(NamedTuple):
    """What a search found at its roots; `A` actions, or `K` candidates for Box.

    Attributes:
      action: [B, ...] chosen, in the units of the environment.
      weights: [B, A] or [B, K] improved policy, sums to one; zero where there is no action.
      value: [B] mean return of the simulations, of the player to move, with the root's own
        predicted value as one of them.
      candidates: [B, K, ...] sampled actions in the units of the environment; None for Discrete.
      prior_logits: [B, A] or [B, K] policy before the search: masked, corrected for how the
        candidates were sampled, without exploration noise.
      qvalues: [B, A] or [B, K] return of each action; `value` where it was not tried.
    """

    action: Array
    weights: Array
    value: Array
    candidates: Array | None
    prior_logits: Array
    qvalues: Array


class Search(Protocol):
    """`search(...)`: see there."""

    def __call__(
        self,
        params: Params,
        key: Key,
        state: State,
        invalid: Array | None = None,
        noise: float | Array = 1.0,
        temperature: float | Array = 1.0,
    ) -> Found: ...


class _View(NamedTuple):
    """Prediction at a state: logits [B, A] or [B, K], value [B], candidates or None."""

    logits: Array
    value: Array
    actions: Array | None


def uniform_predictor(spec: EnvSpec, value: Value | None = None) -> Predictor:
    """Make a predictor without a policy: equal logits, or a broad normal for Box actions.

    Args:
      spec: spaces of the task.
      value: optional `(params, state) -> [B]` in units of return; 0 otherwise.

    Returns:
      A `Predictor`: logits [B, A] of zeros for Discrete; for Box mean and log-deviation
      [B, 2 A] of zeros, a standard normal in half-ranges, a third of which lies on the bounds.
    """
    size = spaces.flat_size(spec.action) * (2 if isinstance(spec.action, Box) else 1)

    def predict(params: Params, state: State) -> tuple[Array, Array]:
        batch = jax.tree.leaves(state)[0].shape[0]
        found = jnp.zeros(batch) if value is None else value(params, state)
        return jnp.zeros((batch, size)), found

    return Predictor(predict)


def _check_spec(spec: EnvSpec, legal: Legal | None) -> None:
    if not isinstance(spec.action, Box | Discrete):
        raise ValueError(
            f"action space of {spec.id}: search needs Box or Discrete, got {spec.action}; flatten "
            "the action into one Discrete"
        )
    if isinstance(spec.action, Box):
        spaces.finite_bounds(spec.action, "action space")
        if legal is not None:
            raise ValueError(
                f"legal: got a rule for {spec.id}, whose actions are a Box; expected None, rules "
                "are for Discrete actions"
            )


def _viewer(
    spec: EnvSpec, predictor: Predictor, config: SearchConfig, legal: Legal | None
) -> Callable[[Params, Key, State], _View]:
    """Build `(params, key, state) -> _View`, the prediction as mctx can use it."""
    size = spaces.flat_size(spec.action)
    discrete = isinstance(spec.action, Discrete)

    def view(params: Params, key: Key, state: State) -> _View:
        batch = jax.tree.leaves(state)[0].shape[0]
        policy, value = predictor.predict(params, state)
        shapes = [(batch, size)] if discrete else [(batch, size), (batch, 2 * size)]
        if policy.shape not in shapes or value.shape != (batch,):
            raise ValueError(
                f"predictor: got logits {policy.shape} and value {value.shape}, expected "
                f"{' or '.join(map(str, shapes))} and {(batch,)}; read them off the state [B, ...]"
            )
        policy, value = policy.astype(jnp.float32), value.astype(jnp.float32)
        if not discrete:
            policy = policy.reshape(batch, -1, size)
            actions, logits = propose(key, policy, config.candidates, config.std, config.flatten)
            return _View(logits, value, actions)
        logits = jnp.nan_to_num(policy, nan=MASKED, posinf=-MASKED, neginf=MASKED)
        if legal is not None:
            logits = jnp.where(legal(params, state), logits, MASKED)
        return _View(logits, value, None)

    return view


def search(
    mdp: MDP, predictor: Predictor, config: SearchConfig, legal: Legal | None = None
) -> Search:
    """Build a tree search from `B` states at once.

    A stochastic model is sampled once per expansion: a node is one of the states that its action
    may lead to. Only at `max_depth` is a leaf sampled anew at every visit, so that the nodes above
    it average. An outcome of discount 0 ends the value.

    A step whose reward, discount or value is not finite is given what is worse than anything on
    the way to it (the value of its parent less the largest reward or value met since the root),
    ends there, and is not chosen again as long as it has a sibling; it neither sets the scale of
    its siblings nor takes part in their comparison.

    Reference: MuZero, Schrittwieser et al. 2020 (arXiv:1911.08265); Policy improvement by planning
    with Gumbel, Danihelka et al. 2022; Sampled MuZero, Hubert et al. 2021 (arXiv:2104.06303).

    Args:
      mdp: what is searched: simulator, learned ensemble, latent or value-equivalent model.
      predictor: prior and value. For Discrete logits [B, A], where -inf is an action that does
        not exist; for Box the mean [B, A], or mean and log-deviation [B, 2 A], of a Gaussian
        over actions in `[-1, 1]`.
      config: see `SearchConfig`.
      legal: optional rule that masks Discrete actions at the root and inside the tree.

    Returns:
      `(params, key, state, invalid=None, noise=1.0, temperature=1.0) -> Found`. `state` has leaves
      [B, ...]; `invalid` [B, A] bool masks Discrete actions at the root. `noise`, a scalar or [B]
      in [0, 1], scales exploration; at 0 Discrete actions depend on the key only through the
      model, Box actions through their candidates too. `temperature`, a scalar or [B], is that of
      the choice among visits (puct; 0 = most visited, as without noise). Both may be traced.

    Raises:
      ValueError: for action spaces that are neither bounded Box nor Discrete, or a rule for a
        Box; when called, for a mask for a Box and for predictions of another shape.
    """
    _check_spec(mdp.spec, legal)
    space = mdp.spec.action
    discrete = isinstance(space, Discrete)
    view = _viewer(mdp.spec, predictor, config, legal)
    sign = -1.0 if config.two_player else 1.0

    def expand(bundle: Any, key: Key, index: Array, node: Node) -> tuple[Any, Node]:
        params, model_key = bundle
        step_key, view_key = jax.random.split(jax.random.fold_in(model_key, jax.random.bits(key)))
        state, outcome = mdp.step(params, step_key, node.state, decode(node.actions, index))
        logits, value, actions = view(params, view_key, state)
        reward, survival = (jnp.asarray(x, jnp.float32) for x in outcome[:2])
        value = jnp.where(survival == 0.0, 0.0, value)
        sizes = jnp.abs(jnp.stack([reward, survival, value]))
        broken = ~jnp.all(sizes < HUGE, 0)
        reward = jnp.where(broken, node.value - node.scale, reward)
        survival, value = (jnp.where(broken, 0.0, x) for x in (survival, value))
        scale = jnp.maximum(node.scale, jnp.maximum(jnp.abs(reward), jnp.abs(value)))
        step = _mctx.RecurrentFnOutput(
            reward=reward,
            discount=sign * config.discount * survival,
            prior_logits=logits,
            value=value,
        )
        return step, Node(state, actions, value, scale, broken)

    def decode(actions: Array | None, index: Array) -> Array:
        if actions is None:
            return index
        chosen = jnp.take_along_axis(actions, index[:, None, None], 1)[:, 0]
        return spaces.decode_action(space, chosen)

    def run(
        params: Params,
        key: Key,
        state: State,
        invalid: Array | None = None,
        noise: float | Array = 1.0,
        temperature: float | Array = 1.0,
    ) -> Found:
        if invalid is not None and not discrete:
            raise ValueError("invalid: got a mask, but the actions are a Box; expected None")
        view_key, model_key, key = jax.random.split(key, 3)
        logits, value, actions = view(params, view_key, state)
        if invalid is not None:
            logits = jnp.where(invalid, MASKED, logits)
        value = jnp.where(jnp.abs(value) < HUGE, value, 0.0)
        scale = jnp.maximum(jnp.abs(value), 1e-6)
        root = Node(state, actions, value, scale, jnp.zeros(value.shape, bool))
        noise, temperature = (
            jnp.broadcast_to(jnp.asarray(x, jnp.float32), value.shape) for x in (noise, temperature)
        )
        common = {
            "params": (params, model_key),
            "recurrent_fn": expand,
            "num_simulations": config.simulations,
            "invalid_actions": logits <= MASKED,
            "max_depth": config.max_depth or None,
        }
        start = _mctx.RootFnOutput(prior_logits=logits, value=value, embedding=root)
        engine = gumbel if config.method == "gumbel" else puct
        index, weights, tree = engine(config, key, start, common, noise, temperature)
        summary = tree.summary()
        tried = summary.visit_counts > 0
        qvalues = jnp.where(tried, summary.qvalues, summary.value[:, None])
        candidates = None if actions is None else spaces.decode_action(space, actions)
        action = decode(actions, index.astype(jnp.int32))
        return Found(action, weights, summary.value, candidates, logits, qvalues)

    return run


def tree_search(
    mdp: MDP, config: PlannerConfig, prior: Prior | None = None, value: Value | None = None
) -> Planner:
    """Build a planner that searches a tree without a policy and acts without noise.

    `population` is the number of simulations, `horizon` the depth of the tree, `elites` the
    number of candidates per node (Box), `discount` gamma; the other settings mean nothing here.
    A leaf is worth `value`, and a tree is rarely as deep as its horizon: without a value, what
    lies beyond a leaf counts as 0, wherever the leaf is.

    Reference: Policy improvement by planning with Gumbel, Danihelka et al. 2022.

    Args:
      mdp: the model to plan in.
      config: see above.
      prior: not supported.
      value: optional value of the leaves.

    Returns:
      A `Planner` without a warm start; `info` holds `value` [B], the return that the improved
      policy expects at the root.

    Raises:
      ValueError: for a policy prior, or for more Discrete actions than simulations.
    """
    if prior is not None or config.prior_plans:
        given = "no policy prior" if prior is None else "a policy prior"
        raise ValueError(
            f"planner.prior_plans: got {config.prior_plans} and {given}; expected 0 and none, tree "
            "search imagines no plans of a policy; use mbrl.planning.search with a Predictor"
        )
    space = mdp.spec.action
    if isinstance(space, Discrete) and space.num > config.population:
        raise ValueError(
            f"planner.population: got {config.population} simulations for {space.num} actions; "
            f"expected at least {space.num}, or some of the actions would never be tried"
        )
    # mctx's 50 holds on to the first child that pays off, which needs a value that is right: on
    # random trees of depth 4 without one it lost 0.11 at 32 simulations, 10 lost 0.01.
    settings = SearchConfig(
        maxvisit_init=10.0,
        simulations=config.population,
        max_considered=config.population,
        candidates=config.elites,
        discount=config.discount,
        max_depth=config.horizon,
    )
    find = search(mdp, uniform_predictor(mdp.spec, value), settings)

    def init(batch: int) -> tuple[()]:
        del batch
        return ()

    def plan(
        params: Params, key: Key, state: State, carry: tuple[()]
    ) -> tuple[Array, tuple[()], Metrics]:
        found = find(params, key, state, noise=0.0)
        return found.action, carry, {"value": jnp.sum(found.weights * found.qvalues, -1)}

    return Planner(init, plan)
