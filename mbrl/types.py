"""The contracts of the library: named tuples of pure functions over explicit pytrees.

Notation (used everywhere): `B` batch, `T` time, `N` ensemble members, `P` planner
population, `Q` particles, `H` horizon, `A` action size, `D` feature size, `E`
environments, `S` seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np

Array = jax.Array
Key = jax.Array
"""A typed PRNG key, `jax.random.key(seed)`; every function consumes its key once."""
Params = Any
State = Any
Carry = Any
Metrics = dict[str, Array]


class Box(NamedTuple):
    """Real vectors or images between two bounds.

    Attributes:
      shape: of one element, without batch axes.
      low: [*shape] lower bounds in the units of the environment; -inf when unbounded.
      high: [*shape] upper bounds.
      dtype: numpy dtype of the data (uint8 for images).
    """

    shape: tuple[int, ...]
    low: np.ndarray
    high: np.ndarray
    dtype: np.dtype = np.dtype(np.float32)


class Discrete(NamedTuple):
    """Integers `0 .. num - 1`, stored as int32 scalars."""

    num: int


class MultiDiscrete(NamedTuple):
    """Vectors of integers, `0 <= x[i] < nums[i]`, stored as int32 `[len(nums)]`."""

    nums: tuple[int, ...]


Space = Box | Discrete | MultiDiscrete | Mapping[str, "Space"]
"""A leaf space, or a mapping of names to spaces for Dict observations."""


class EnvSpec(NamedTuple):
    """What an agent may know of a task before it has seen any data.

    Attributes:
      id: name of the environment, for messages and manifests.
      observation: space of one observation.
      action: space of one action, in the units of the environment.
      max_episode_steps: steps after which an episode is truncated; None = never.
      players: 1, or 2 where two players alternate: the reward of a step is that of the player
        who has acted, the observation that of the one who acts next.
    """

    id: str
    observation: Space
    action: Space
    max_episode_steps: int | None = None
    players: int = 1


class Outcome(NamedTuple):
    """What one step of an `MDP` yields besides the next state.

    Attributes:
      reward: [B] reward of the step.
      discount: [B] 1 continue, 0 terminal; between: predicted survival probability.
      uncertainty: [B] epistemic standard deviation of the model about this step, in
        units of reward; 0 for a simulator; None when the model was built without it
        (it costs one evaluation of every member).
    """

    reward: Array
    discount: Array
    uncertainty: Array | None


class InitFn(Protocol):
    def __call__(self, params: Params, key: Key, /, obs: Any = None, batch: int = 1) -> State: ...


class StepFn(Protocol):
    def __call__(
        self, params: Params, key: Key, state: State, action: Array, /
    ) -> tuple[State, Outcome]: ...


class ObserveFn(Protocol):
    def __call__(self, params: Params, state: State, /) -> Any: ...


class MDP(NamedTuple):
    """A Markov decision process as three pure functions: the one abstraction.

    State leaves, actions and outcomes carry a leading batch axis `[B]`. Continuous
    actions are `[B, *shape]` in the units of the environment, discrete ones int32 `[B]`.

    Attributes:
      init: `(params, key, obs=None, batch=1) -> state`; with `obs` (leading axis `[B]`)
        the state that this observation implies, without it `batch` start states.
      step: `(params, key, state, action) -> (state, Outcome)`.
      observe: `(params, state) -> obs` with leading axis `[B]`.
      spec: observation and action spaces.
    """

    init: InitFn
    step: StepFn
    observe: ObserveFn
    spec: EnvSpec


class Predictor(NamedTuple):
    """Policy prior and value of a state: `predict(params, state) -> (logits, value)`.

    `logits` is `[B, A]` (discrete), or the mean action `[B, A]` in units of `[-1, 1]`, or mean
    and log-deviation `[B, 2 A]` (continuous); `value` is `[B]`. Together with `MDP.step` this is
    a tree search's recurrent function.
    """

    predict: Callable[[Params, State], tuple[Array, Array]]


class Network(NamedTuple):
    """Any neural network: `init(key, x) -> params`, `apply(params, x) -> y`.

    `x` and `y` have one leading batch axis, `[B, D]`.
    """

    init: Callable[[Key, Array], Params]
    apply: Callable[[Params, Array], Array]


class Planner(NamedTuple):
    """Model-predictive control over an `MDP`, batched over `B` start states.

    Attributes:
      init: `(batch) -> carry`, the plan without a warm start.
      plan: `(params, key, state, carry) -> (action, carry, info)`; `action` has a
        leading `[B]`, `info` is a dict of arrays with a leading `[B]`.
    """

    init: Callable[[int], Carry]
    plan: Callable[[Params, Key, State, Carry], tuple[Array, Carry, Metrics]]


class Record(NamedTuple):
    """One environment step. Leaves are `[E, ...]`, in replay `[E, T, ...]`.

    Reward and flags arrive *with* the observation, `action` is the one taken at it. The
    final observation of an episode is a record of its own (`is_last`); its action is
    ignored by the environment. Hence a transition is any `t` with `not is_last[t]` and
    `not is_first[t + 1]` (an episode may be cut off by a fault), its successor `t + 1`.

    Attributes:
      obs: observation pytree in the units of the environment.
      action: action taken at `obs`.
      reward: float32, arrives with `obs`; 0 where `is_first`.
      is_first: bool, `obs` is the first of an episode.
      is_last: bool, `obs` is the last of an episode (terminated or truncated).
      is_terminal: bool, the episode ended by itself: no value beyond `obs`.
      extras: dict of whatever the agent wants stored beside the record.
    """

    obs: Any
    action: Array
    reward: Array
    is_first: Array
    is_last: Array
    is_terminal: Array
    extras: Any = ()


class TimeStep(NamedTuple):
    """What an environment emits: a `Record` before the agent has acted. Leaves `[E, ...]`."""

    obs: Any
    reward: Array
    is_first: Array
    is_last: Array
    is_terminal: Array


class Transition(NamedTuple):
    """One step of experience, leaves `[B, ...]`: what one-step models learn from."""

    obs: Any
    action: Array
    reward: Array
    next_obs: Any
    is_terminal: Array


class Batch(NamedTuple):
    """What replay hands to `Agent.update`.

    Attributes:
      record: `[K, B, T, ...]` for kind 'sequences', `[E, T, ...]` for 'latest',
        `[E, C, ...]` (the whole ring) for 'all'.
      valid: bool. 'sequences' and 'latest': the record holds data. 'all': row `t` starts
        a transition whose successor is row `(t + 1) % C`.
      index: int32 `[..., 2]` (environment, ring row) of the first record of each
        sequence: the address for `feedback`. None for 'latest' and 'all'.
      odds: [K, B] how much likelier each sequence was to be drawn than on average: the
        inverse of its importance weight. None where all are alike.
      newest: int32 [], row of the newest record ('all'). None for other kinds, and where no record
        is newer than another because all were there before training.
    """

    record: Record
    valid: Array
    index: Array | None = None
    odds: Array | None = None
    newest: Array | None = None


class SampleSpec(NamedTuple):
    """What an agent asks of replay, and how often.

    Attributes:
      kind: 'sequences' = `updates` minibatches of `batch_size` sequences; 'latest' = the
        last `length` records of every environment; 'all' = the whole ring.
      capacity: records to keep per seed, over all environments.
      start: environment steps of random actions before the first update.
      every: environment steps between two calls of `update`.
      updates: minibatches per call ('sequences'); more where one step of all environments
        holds several calls' worth of steps.
      batch_size: sequences per minibatch ('sequences').
      length: records per sequence ('sequences', 'latest'). 0 with 'latest': those since the last
        call, so that one state of the agent has acted at all of them.
      priority: name of an entry of the extras, [] per record: sequences are drawn in
        proportion to that of their first record; '' = uniformly.
    """

    kind: Literal["sequences", "latest", "all"]
    capacity: int
    start: int
    every: int
    updates: int = 1
    batch_size: int = 1
    length: int = 2
    priority: str = ""


Mode = Literal["random", "explore", "greedy"]


class Agent(NamedTuple):
    """A learner and actor as pure functions over ONE state pytree.

    Attributes:
      init: `(key) -> state`.
      begin: `(num_envs) -> carry`, the acting state of `num_envs` environments.
      act: `(state, carry, obs, is_first, key, mode) -> (action, carry, extras)`; rows
        with `is_first` start from a fresh carry. `mode` is static: 'random' (uniform
        actions before the first update), 'explore' (training) or 'greedy' (evaluation).
      update: `(state, batch, key) -> (state, metrics, feedback)`; `feedback` is None or
        a pytree of per-sequence values to store beside the sampled records.
      sampling: what `update` needs.
    """

    init: Callable[[Key], State]
    begin: Callable[[int], Carry]
    act: Callable[[State, Carry, Any, Array, Key, Mode], tuple[Array, Carry, Any]]
    update: Callable[[State, Batch, Key], tuple[State, Metrics, Any]]
    sampling: SampleSpec


def reset_rows(mask: Array, fresh: Carry, carry: Carry) -> Carry:
    """Replace the rows of `carry` where `mask` holds by those of `fresh`.

    Args:
      mask: [B] bool.
      fresh: pytree of [B, ...] leaves.
      carry: pytree of the same structure.

    Returns:
      Pytree of [B, ...] leaves.
    """

    def pick(new: Array, old: Array) -> Array:
        return jax.numpy.where(mask.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(pick, fresh, carry)
