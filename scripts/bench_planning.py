"""The parts of `mbrl bench planning`: planners, model learning and seeds."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import envs
from agents.pets import PETSConfig, make_pets
from mbrl import optim, spaces
from mbrl.fitting import FitConfig, fit_members
from mbrl.models.probabilistic import ProbabilisticEnsemble, probabilistic_ensemble
from mbrl.planning import PETS_CEM, PlannerConfig, planner
from mbrl.training.device import run_device
from mbrl.training.learner import DriverConfig
from mbrl.types import MDP, EnvSpec, Transition
from scripts.timing import beside_gemm, warm_seconds

COUNTED = (
    "two FLOP per weight of the network for dynamics and reward, biases and activations not "
    "counted, times plans x particles x horizon x iterations"
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the cases are, so that a test can shrink them all."""

    gemm: tuple[int, int] = (10_000, 200)
    hidden: tuple[int, ...] = (200, 200, 200, 200)
    small_task: tuple[int, int] = (4, 1)
    small: PlannerConfig = PlannerConfig(
        method="cem", horizon=15, population=500, elites=50, iterations=5, particles=20
    )
    large_task: tuple[int, int] = (17, 6)
    large: PlannerConfig = PlannerConfig(
        method="cem", horizon=30, population=400, elites=40, iterations=5, particles=20
    )
    preset: PETSConfig = PETSConfig()
    batches: tuple[int, ...] = (1, 8, 64)
    transitions: int = 10_000
    seeds: int = 5
    steps: int = 300
    random_steps: int = 100
    train_every: int = 50
    tiny: PETSConfig = PETSConfig(
        hidden=(32, 32),
        max_epochs=5,
        planner=PlannerConfig(population=16, elites=4, iterations=2, horizon=10),
    )


def quick_sizes() -> Sizes:
    """Return sizes that only show that everything runs; most cases share one program."""
    plan = PlannerConfig(method="shooting", horizon=2, population=10, elites=2, particles=5)
    tiny = PETSConfig(hidden=(8, 8), max_epochs=1, planner=plan)
    return Sizes(
        (64, 16), (8, 8), (3, 1), plan, (3, 1), plan, tiny, (1,), 200, 1, 60, random_steps=20,
        train_every=10, tiny=tiny,
    )  # fmt: skip


def parts(quick: bool, repeats: int) -> dict[str, Callable[[], Any]]:
    """Return what can be measured, by name."""
    sizes = quick_sizes() if quick else Sizes()
    return {
        "planning": lambda: planning(sizes, repeats),
        "preset": lambda: preset(sizes, repeats),
        "batch": lambda: batch(sizes, max(3, repeats // 4)),
        "epoch": lambda: epoch(sizes, max(3, repeats // 4)),
        "seeds": lambda: seeds(sizes),
    }


def task(obs: int, act: int) -> EnvSpec:
    """Return the spaces of a task with unbounded observations and actions in [-1, 1]."""
    observation = spaces.box(-jnp.inf, jnp.inf, (obs,))
    return EnvSpec(f"bench-{obs}-{act}", observation, spaces.box(-1.0, 1.0, (act,)))


def network_flop(obs: int, act: int, hidden: Sequence[int]) -> int:
    """Count the FLOP of one model evaluation: mean and log-variance of change and reward."""
    widths = [obs + act, *hidden, 2 * (obs + 1)]
    return 2 * sum(a * b for a, b in itertools.pairwise(widths))


def act_function(
    mdp: MDP, config: PlannerConfig
) -> tuple[Callable[..., Any], Callable[[int], Any], list[int]]:
    """Return a jitted `act(params, key, obs, carry)`, `init(batch)` and what counts traces."""
    mpc = planner(mdp, config)
    traces = [0]

    @jax.jit
    def act(params: Any, key: jax.Array, obs: jax.Array, carry: Any) -> Any:
        traces[0] += 1  # Python runs only while jax traces
        init_key, plan_key = jax.random.split(key)
        start = mdp.init(params, init_key, obs)
        action, carry, _ = mpc.plan(params, plan_key, start, carry)
        return action, carry

    return act, mpc.init, traces


def time_act(
    model: ProbabilisticEnsemble,
    config: PlannerConfig,
    obs: int,
    measure: Callable[[Callable[[int], Any]], Any],
    batch: int = 1,
) -> tuple[Any, dict[str, Any]]:
    """Time warm-started calls of one planner, and count its traces.

    Args:
      model: what to plan on.
      config: how to plan.
      obs: size of the observation.
      measure: `(call) -> times`, given `call(i)`.
      batch: start states planned for in one call.

    Returns:
      What `measure` returned; seconds of the first call and the number of traces.

    Raises:
      RuntimeError: when a warm call was traced again.
    """
    params = model.init(jax.random.key(1))
    act, init, traces = act_function(model.mdp("ts1", uncertainty=False), config)
    key = jax.random.key(2)
    starts = jax.random.normal(jax.random.key(3), (batch, obs))
    carry = jax.block_until_ready(jax.jit(init, static_argnums=0)(batch))
    start = time.perf_counter()
    _, carry = jax.block_until_ready(act(params, key, starts, carry))
    first = time.perf_counter() - start
    _, carry = jax.block_until_ready(act(params, key, starts, carry))
    warm = traces[0]

    def call(i: int) -> Any:
        nonlocal carry
        action, carry = act(params, jax.random.fold_in(key, i), starts, carry)
        return action

    times = measure(call)
    if traces[0] != warm:
        raise RuntimeError(f"planning was traced {traces[0] - warm} times after the warm-up")
    return times, {"first_call_seconds": first, "traces": traces[0]}


def act_case(
    sizes: Sizes, obs: int, act: int, plan: PlannerConfig, net: PETSConfig, repeats: int
) -> dict[str, Any]:
    """Measure one planner, with its rate beside that of the GEMM at the same time."""
    flop = network_flop(obs, act, net.hidden) * plan.evaluations()
    model = probabilistic_ensemble(task(obs, act), net.members, net.hidden, dtype=net.dtype)
    timed, counts = time_act(model, plan, obs, lambda call: beside_gemm(call, repeats, sizes.gemm))
    return {
        "obs": obs,
        "act": act,
        "method": plan.method,
        "population": plan.population,
        "horizon": plan.horizon,
        "iterations": plan.iterations,
        "particles": plan.particles,
        "members": net.members,
        "hidden": list(net.hidden),
        "dtype": net.dtype,
        "evaluations": plan.evaluations(),
        **timed.rates(1e-9 * flop),
        **counts,
    }


def planning(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Measure one act() of PETS-CEM on a small and a large task, in f32 and bf16."""
    found: dict[str, Any] = {}
    cases = (("a", sizes.small_task, sizes.small), ("b", sizes.large_task, sizes.large))
    for name, (obs, act), plan in cases:
        for dtype in ("float32", "bfloat16"):
            net = PETSConfig(hidden=sizes.hidden, dtype=dtype)
            found[f"{name}_{dtype}"] = act_case(sizes, obs, act, plan, net, repeats)
        fast, slow = found[f"{name}_bfloat16"], found[f"{name}_float32"]
        fast["speedup_over_float32"] = slow["median_seconds"] / fast["median_seconds"]
    return found


def preset(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Measure one act() of the default settings, which are meant for a CPU."""
    config = sizes.preset
    case = act_case(sizes, 3, 1, config.planner, config, repeats)
    return case | {"fewer_evaluations_than_pets": PETS_CEM.evaluations() / case["evaluations"]}


def batch(sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    """Compare one call for B start states with B calls for one, default settings."""
    config = sizes.preset
    model = probabilistic_ensemble(task(3, 1), config.members, config.hidden)

    def seconds(size: int, repeats: int) -> float:
        times, _ = time_act(
            model, config.planner, 3, lambda call: warm_seconds(call, repeats), size
        )
        return statistics.median(times)

    single = seconds(1, repeats * max(sizes.batches[-1] // 8, 1))
    found = []
    for size in sizes.batches:
        together, apart = seconds(size, repeats), size * single
        found.append({
            "batch": size, "one_call_seconds": together, "single_calls_seconds": apart,
            "ratio": together / apart,
        })  # fmt: skip
    return found


def epoch(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Measure one epoch of ensemble training, with the error on a tenth held out, and what it
    costs to look for gradients that are not finite.
    """
    num, members = sizes.transitions, 5
    model = probabilistic_ensemble(task(4, 1), members, sizes.hidden)
    keys = jax.random.split(jax.random.key(4), 4)
    obs = jax.random.normal(keys[0], (num, 4))
    action = jax.random.uniform(keys[1], (num, 1), minval=-1.0)
    next_obs = obs + 0.1 * jnp.tanh(obs[:, ::-1]) + 0.1 * action
    rows = Transition(obs, action, -jnp.sum(obs**2, -1), next_obs, jnp.zeros(num, bool))
    held = jnp.arange(num) % 10 == 0
    state = model.standardize(model.init(keys[2]), rows, ~held)
    plain = optax.chain(optim.clip_by_member_norm(100.0), optax.adamw(1e-3, mask=optim.decay_mask))
    config = FitConfig(batch_size=256, max_epochs=1, min_batches=1)

    def one_epoch(optimizer: optax.GradientTransformation) -> Callable[[jax.Array], Any]:
        return jax.jit(
            lambda key: fit_members(
                lambda w, x: model.loss(w, state, x),
                lambda w, x, mask: model.error(w, state, x, mask),
                optimizer, state.weights, optimizer.init(state.weights), rows, ~held, held, key,
                config,
            )
        )  # fmt: skip

    fits = {"plain": one_epoch(plain), "guarded": one_epoch(optim.apply_if_finite_counted(plain))}
    calls = jax.random.split(keys[3], repeats + 1)
    start = time.perf_counter()
    jax.block_until_ready(fits["plain"](calls[-1]))
    first = time.perf_counter() - start
    jax.block_until_ready(fits["guarded"](calls[-1]))
    wall: dict[str, list[float]] = {name: [] for name in fits}
    cpu: dict[str, list[float]] = {name: [] for name in fits}
    for key in calls[:-1]:  # in turns, so that a change of the machine's speed meets both
        for name, fit in fits.items():
            used = time.process_time()
            wall[name] += warm_seconds(lambda i, fit=fit, key=key: fit(key), 1)
            cpu[name].append(time.process_time() - used)
    return {
        "transitions": num, "held_out": int(held.sum()), "batch_size": config.batch_size,
        "members": members, "hidden": list(sizes.hidden),
        "median_cpu_seconds": statistics.median(cpu["plain"]),
        "min_cpu_seconds": min(cpu["plain"]),
        "median_seconds": statistics.median(wall["plain"]), "min_seconds": min(wall["plain"]),
        "compile_seconds": max(0.0, first - statistics.median(wall["plain"])),
        "share_of_guard": statistics.median(
            guarded / bare - 1.0
            for guarded, bare in zip(wall["guarded"], wall["plain"], strict=True)
        ),
    }  # fmt: skip


def seeds(sizes: Sizes) -> dict[str, Any]:
    """Compare training several seeds in one program with one seed, on device/Pendulum."""
    found: dict[str, Any] = {}
    for name, config in (("tiny", sizes.tiny), ("default", sizes.preset)):
        config = dataclasses.replace(
            config, random_steps=sizes.random_steps, train_every=sizes.train_every
        )
        one, several = (train_seconds(sizes, config, num) for num in (1, sizes.seeds))
        found[name] = {
            "seeds": sizes.seeds, "steps": sizes.steps, "hidden": list(config.hidden),
            "evaluations": config.planner.evaluations(),
            "one": one, "several": several,
            "ratio": several["warm_seconds"] / one["warm_seconds"],
            "ratio_with_compilation": several["total_seconds"] / one["total_seconds"],
        }  # fmt: skip
    return found


def train_seconds(sizes: Sizes, config: PETSConfig, num_seeds: int) -> dict[str, float]:
    """Train briefly; report the whole time, and that of the intervals after compilation."""
    env: Any = envs.make("device/Pendulum", 1)
    driver = DriverConfig(sizes.steps, 1, tuple(range(num_seeds)), sizes.train_every)
    start = time.perf_counter()
    ends = []
    for report in run_device(
        lambda hyper: make_pets(env.spec, dataclasses.replace(config, **hyper)), env, driver
    ):
        jax.block_until_ready(report.learner)
        ends.append(time.perf_counter())
    # The first report is the warm-up and the second compiles the loop.
    return {"total_seconds": ends[-1] - start, "warm_seconds": ends[-1] - ends[1]}
