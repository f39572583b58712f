"""Result lines of what `mbrl bench` and `bench_peers.py` have measured, with their targets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def cores_text(number: int) -> str:
    """Write a number of cores out."""
    return "1 core" if number == 1 else f"{number} cores"


def speed(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Turn the JSON of `mbrl bench` or `bench_peers.py` into result lines.

    Raises:
      ValueError: for a run with `--quick`, whose figures mean nothing.
    """
    if measured.get("quick", True):
        raise ValueError("bench: got a run with --quick, expected one without")
    machine = measured["hardware"]
    gemm = measured["gemm"]
    rates = f"{gemm['before_gflops']:.0f} and {gemm['after_gflops']:.0f}"
    # The product that fills a CPU only tells how fast an accelerator starts one.
    rates = "" if machine["accelerator"] else f"GEMM rate before and after: {rates} GFLOP/s. "
    common = {
        "benchmark": "Speed",
        "command": measured["command"],
        "versions": measured["versions"],
        "commit": measured["commit"],
        "hardware": machine["accelerator"] or f"{machine['cpu']}, {cores_text(machine['cores'])}",
        "date": measured["date"],
        "note": f"{rates}Load of the machine at the start: {measured['load_before'][0]:.1f}.",
    }
    pinned = ""  # a figure of one core does not replace that of the machine
    if machine["cores"] != machine["all_cores"]:
        pinned = f", {machine['cores']} of {machine['all_cores']} cores"
    if machine["accelerator"]:  # nor does one of an accelerator, and targets are a CPU's
        pinned = f", {machine['accelerator']}"
    planning = {
        "planning": _planning, "preset": _preset, "batch": _batch, "epoch": _epoch,
        "seeds": _seeds, "peers": _peers,
    }  # fmt: skip
    dreamer = {
        "1m": _update, "12m": _update, "image": _update, "start": _update_start,
        "seeds": _update_seeds,
    }  # fmt: skip
    muzero = {
        "search": _searches, "reanalysis": _reanalysis, "train": _training,
        "update": _muzero_update,
    }  # fmt: skip
    ppo = {"train": _ppo_training, "seeds": _ppo_seeds, "peers": _ppo_peers}
    mbpo = {"epoch": _mbpo_epoch, "imagine": _imagining, "update": _mbpo_updates}
    rlhf = {
        "reward": _reward_step, "direct": _direct_step, "generate": _generation,
        "ppo": _ppo_iteration, "members": _members, "rankings": _rankings, "peers": _rlhf_peers,
        "full": _full_step,
    }  # fmt: skip
    kinds = {"dreamer": dreamer, "muzero": muzero, "ppo": ppo, "mbpo": mbpo, "rlhf": rlhf}
    parts = kinds.get(measured["benchmark"], planning)
    rows = [
        {"task": task, "setting": setting + pinned, "metric": metric, "value": value,
         "target": target if part == "full" or not machine["accelerator"] else None}
        for part, lines in parts.items()
        if part in measured
        for task, setting, metric, value, target in lines(measured[part])
        if math.isfinite(value)
    ]  # fmt: skip
    return [common | row for row in rows]


Line = tuple[str, str, str, float, str | None]
"""Task, setting, metric, value and target."""


def _planning(cases: Mapping[str, Any]) -> Iterable[Line]:
    for case in cases.values():
        task = f"PETS-CEM act(), obs {case['obs']}, action {case['act']}"
        setting = f"{case['population']} plans, horizon {case['horizon']}, {case['dtype']}"
        plain = case["dtype"] == "float32"
        yield task, setting, "seconds", case["median_seconds"], None
        yield task, setting, "GFLOP/s", case["gflops"], None
        share = ">= 0.7" if plain else None
        yield task, setting, "share of the f32 GEMM rate", case["share_of_gemm"], share
        if not plain:
            yield task, setting, "times faster than f32", case["speedup_over_float32"], ">= 1.75"
        yield task, setting, "traces", case["traces"], "<= 3"


def _preset(case: Mapping[str, Any]) -> Iterable[Line]:
    task, setting = "default PETS act()", f"{case['evaluations']:,} model evaluations"
    yield task, setting, "seconds", case["median_seconds"], "<= 0.12"
    fewer = case["fewer_evaluations_than_pets"]
    yield task, setting, "times fewer evaluations than PETS-CEM", fewer, ">= 10"


def _batch(cases: Iterable[Mapping[str, Any]]) -> Iterable[Line]:
    for case in cases:
        size = case["batch"]
        setting = f"B = {size}"
        target = "<= 1" if size > 1 else None
        yield "B starts in one act()", setting, "time relative to B calls", case["ratio"], target


def _epoch(case: Mapping[str, Any]) -> Iterable[Line]:
    task = f"one ensemble epoch, {case['transitions']:,} transitions"
    setting = f"{case['members']} x {'-'.join(map(str, case['hidden']))}"
    yield task, setting, "CPU seconds", case["median_cpu_seconds"], "<= 0.5"
    yield task, setting, "seconds", case["median_seconds"], None
    guard = "share of an epoch that the check of gradients takes"
    yield task, setting, guard, case["share_of_guard"], "<= 0.01"


def _seeds(cases: Mapping[str, Any]) -> Iterable[Line]:
    for name, case in cases.items():
        # The target holds where planning leaves the machine idle; the default may not.
        target = "<= 3" if name == "tiny" else None
        task = f"{case['seeds']} seeds in one program"
        yield task, f"{name} settings", "time relative to one seed", case["ratio"], target


def _peers(cases: Mapping[str, Any]) -> Iterable[Line]:
    for case in cases.values():
        ours, theirs = case["ours"], case["mbrl_lib"]
        task = f"PETS-CEM act(), obs {ours['obs']}, action {ours['act']}"
        setting = f"{ours['population']} plans, horizon {ours['horizon']}, float32"
        yield task, f"{setting}, by mbrl-lib", "seconds", theirs["median_seconds"], None
        share = theirs["share_of_gemm"]
        yield task, f"{setting}, by mbrl-lib", "share of the f32 GEMM rate", share, None
        beside = f"{setting}, in turns with mbrl-lib"
        yield task, beside, "seconds", ours["median_seconds"], None
        yield task, beside, "times faster than mbrl-lib", case["times_faster"], ">= 1"


def _update(case: Mapping[str, Any]) -> Iterable[Line]:
    shape = case["observation"]
    pixels = len(shape) > 1
    task = f"Dreamer update, {case['size']}, {'x'.join(map(str, shape))} observation"
    setting = f"batch {case['batch'][0]} x {case['batch'][1]}, {case['dtype']}"
    bound = 1.5 if pixels else {"1m": 0.35, "12m": 3.0}[case["size"]]
    yield task, setting, "seconds", case["median_seconds"], f"<= {bound:g}"
    yield task, setting, "GFLOP/s", case["gflops"], None
    yield task, setting, "share of the f32 GEMM rate", case["share_of_gemm"], None
    yield task, setting, "milliseconds per policy step", case["policy_milliseconds"], "<= 0.5"
    memory = "<= 2" if pixels else None
    yield task, setting, "GiB at the peak of the process", case["peak_gib"], memory


def _update_start(case: Mapping[str, Any]) -> Iterable[Line]:
    task, metric = "from Python's start to Dreamer's first update, 1m", "seconds"
    yield task, "nothing compiled before", metric, case["cold_seconds"], "<= 15"
    yield task, "compiled programs on disk", metric, case["cached_seconds"], "<= 15"


def _update_seeds(case: Mapping[str, Any]) -> Iterable[Line]:
    task = f"Dreamer update, {case['seeds']} seeds in one program"
    yield task, "1m", "time relative to one seed", case["ratio"], "<= 2.5"


def _searches(cases: Iterable[Mapping[str, Any]]) -> Iterable[Line]:
    for case in cases:
        yield from _search("MuZero search", case)


def _reanalysis(case: Mapping[str, Any]) -> Iterable[Line]:
    yield from _search("MuZero reanalysis", case)


def _search(task: str, case: Mapping[str, Any]) -> Iterable[Line]:
    setting = f"{case['method']}, B = {case['batch']}, {case['simulations']} simulations"
    yield task, setting, "milliseconds", 1e3 * case["median_seconds"], None
    yield task, setting, "simulations per second", case["simulations_per_second"], None
    what = "roots" if task.endswith("reanalysis") else "actions"
    yield task, setting, f"{what} per second", case["actions_per_second"], None
    share = "share of the time that is not the network's"
    yield task, setting, share, case["bookkeeping_share"], None


def _training(case: Mapping[str, Any]) -> Iterable[Line]:
    task = f"MuZero training, {case['task']}"
    setting = f"{case['num_envs']} environments, {case['simulations']} simulations"
    rate = case["steps_per_second"]
    yield task, setting, "environment steps per second", rate, ">= 1700"
    first = f"seconds to the first report, after {case['first_report_steps']} random steps"
    yield task, setting, first, case["first_report_seconds"], None


def _muzero_update(case: Mapping[str, Any]) -> Iterable[Line]:
    task, setting = "MuZero update", f"batch {case['batch']}, unroll {case['unroll']}"
    yield task, setting, "seconds", case["median_seconds"], None
    yield task, setting, "GFLOP", case["gflop"], None
    yield task, setting, "share of the f32 GEMM rate", case["share_of_gemm"], None


def _ppo_training(case: Mapping[str, Any]) -> Iterable[Line]:
    task, setting = f"PPO training, {case['task']}", f"{case['steps']:,} steps, 1 seed"
    yield task, setting, "seconds with compilation", case["first_seconds"], None
    yield task, setting, "seconds when compiled", case["warm_seconds"], None


def _ppo_seeds(case: Mapping[str, Any]) -> Iterable[Line]:
    task, setting = f"PPO training, {case['task']}", f"{case['seeds']} seeds in one program"
    yield task, setting, "time relative to one seed", case["ratio"], "<= 2"


def _ppo_peers(case: Mapping[str, Any]) -> Iterable[Line]:
    ours, theirs = case["ours"], case["sb3"]
    task, setting = "PPO training, CartPole", f"{ours['steps']:,} steps, 1 seed"
    by = f"{setting}, by Stable-Baselines3 on the host"
    yield task, by, "seconds", theirs["seconds"], None
    yield task, by, "return afterwards", theirs["return"], None
    beside = f"{setting}, in turns with Stable-Baselines3"
    name = "times faster than Stable-Baselines3"
    yield task, beside, f"{name} when compiled", case["times_faster"], ">= 20"
    yield task, beside, f"{name} with compilation", case["times_faster_in_all"], ">= 5"


def _mbpo_epoch(case: Mapping[str, Any]) -> Iterable[Line]:
    task = f"MBPO epoch, {case['task']}"
    setting = (
        f"{case['env_steps']:,} steps, {case['imagined_steps']:,} imagined, "
        f"{case['updates']:,} updates"
    )
    yield task, setting, "seconds in one call", case["one_seconds"], None
    yield task, setting, "seconds call by call", case["calls_seconds"], None
    yield task, setting, "times faster in one call", case["times_faster"], ">= 3"


def _imagining(case: Mapping[str, Any]) -> Iterable[Line]:
    task, setting = "MBPO rollouts", f"{case['members']} x {'-'.join(map(str, case['model']))}"
    yield task, setting, "imagined steps per second", case["steps_per_second"], None
    yield task, setting, "share of the f32 GEMM rate", case["share_of_gemm"], None


def _mbpo_updates(case: Mapping[str, Any]) -> Iterable[Line]:
    task = "MBPO, updates of actor and critics"
    setting = f"batch {case['batch']}, {'-'.join(map(str, case['hidden']))}"
    yield task, setting, "updates per second in one call", case["updates_per_second"], None
    calls = case["updates_per_second_calls"]
    yield task, setting, "updates per second call by call", calls, None
    yield task, setting, "times faster in one call", case["times_faster"], None
    yield task, setting, "share of the f32 GEMM rate", case["share_of_gemm"], None


def _step(task: str, setting: str, case: Mapping[str, Any], bound: str | None) -> Iterable[Line]:
    yield task, setting, "seconds", case["median_seconds"], bound
    yield task, setting, "share of the f32 GEMM rate", case["share_of_gemm"], None


# The bounds are what TRL takes for the same on a quiet machine of two cores.
def _reward_step(case: Mapping[str, Any]) -> Iterable[Line]:
    setting = f"{case['pairs']} pairs x {case['tokens']} tokens"
    yield from _step("RLHF, step of the reward model", setting, case, "<= 0.45")


def _full_step(cases: Mapping[str, Any]) -> Iterable[Line]:
    for dtype, case in cases.items():
        task = "RLHF, step of a reward model of 0.6 billion parameters"
        setting = f"{case['pairs']} pairs x {case['tokens']} tokens, {dtype}"
        yield task, setting, "seconds", case["median_seconds"], None
        rate = case["gemm_gflops"] / 1e3
        yield task, setting, f"TFLOP/s of the {dtype} GEMM beside it", rate, None
        share = case["share_of_gemm"]
        yield task, setting, f"share of the {dtype} GEMM rate", share, ">= 0.4"


def _rlhf_peers(cases: Mapping[str, Any]) -> Iterable[Line]:
    for part, words in (
        ("reward", "step of the reward model"), ("direct", "step of DPO"),
        ("generate", "generation"), ("ppo", "iteration of PPO"),
    ):  # fmt: skip
        case, task = cases[part], f"RLHF, {words}"
        yield task, "by TRL", "seconds", case["trl"]["median_seconds"], None
        beside, metric = "in turns with TRL", "times faster than TRL"
        yield task, beside, metric, case["times_faster"], ">= 1"
        if part == "ppo":
            shared = f"{beside}, critic on the policy"
            yield task, shared, metric, case["shared_times_faster"], ">= 1.5"


def _direct_step(case: Mapping[str, Any]) -> Iterable[Line]:
    setting = f"{case['pairs']} pairs x {case['tokens']} tokens, reference at hand"
    yield from _step("RLHF, step of DPO", setting, case, "<= 0.58")


def _generation(case: Mapping[str, Any]) -> Iterable[Line]:
    setting = f"{case['batch']} x {case['response']} tokens after {case['prompt']}"
    rate = case["tokens_per_second"]
    yield "RLHF, generation", setting, "tokens per second", rate, ">= 3640"


def _ppo_iteration(case: Mapping[str, Any]) -> Iterable[Line]:
    size = f"{case['batch']} x ({case['prompt']} + {case['response']}) tokens"
    setting = f"{size}, {case['epochs']} epochs"
    task = "RLHF, iteration of PPO"
    yield from _step(task, setting, case["separate"], "<= 4.8")
    yield from _step(task, f"{setting}, critic on the policy", case["shared"], "<= 3.2")


def _members(case: Mapping[str, Any]) -> Iterable[Line]:
    task = f"RLHF, {case['members']} reward models in one program"
    setting = f"{case['pairs']} pairs x {case['tokens']} tokens"
    yield task, setting, "time relative to one", case["ratio"], "<= 5"


def _rankings(case: Mapping[str, Any]) -> Iterable[Line]:
    task = f"RLHF, rankings of {case['answers']} answers as one batch element"
    setting = f"{case['prompts']} prompts"
    yield task, setting, "times faster than their pairs", case["ratio"], ">= 5"
