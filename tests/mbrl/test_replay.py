"""Replay against brute-force enumeration of what a stream of records allows."""

import errno
import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import replay
from mbrl.types import Batch, Record, SampleSpec

E = 2
CAPACITY = 17  # 8 rows of two environments; the odd record is dropped
ROWS = 8
SEQUENCES = SampleSpec("sequences", CAPACITY, 0, 1, updates=3, batch_size=50, length=3)
LATEST = SEQUENCES._replace(kind="latest", length=5)
ALL = SEQUENCES._replace(kind="all")

# One letter per record of environment 0 and 1: f first, m middle, l last and truncated,
# t last and terminal. Environment 0 is truncated and 1 terminates, at different times.
STREAMS = ("fmmlfmmlfmmlfm", "fmtfmmmtftfmmm")


def make_record(step: int) -> Record:
    letters = [stream[step] for stream in STREAMS]
    time = 100.0 * np.arange(1, E + 1, dtype=np.float32) + step
    fields: dict[str, Any] = {
        "obs": {"time": time, "image": np.full((E, 2, 2), step, np.uint8)},
        "action": np.stack([time, -time], -1),
        "reward": time / 8,
        "is_first": np.array([x == "f" for x in letters]),
        "is_last": np.array([x in "lt" for x in letters]),
        "is_terminal": np.array([x == "t" for x in letters]),
        "extras": {
            "priority": np.zeros(E, np.float32),
            "latent": {"h": np.zeros((E, 2), np.float32)},
        },
    }
    return Record(**fields)


EXAMPLE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), make_record(0))
add = jax.jit(replay.add)
sample = jax.jit(replay.sample, static_argnames="spec")
write_back = jax.jit(replay.write_back)


@functools.cache
def ring_after(steps: int) -> replay.Ring:
    ring = replay.init(EXAMPLE, E, CAPACITY)
    for step in range(steps):
        ring = add(ring, make_record(step))
    return ring


def host_after(steps: int, directory: Path | None = None) -> replay.HostRing:
    ring = replay.HostRing(EXAMPLE, E, CAPACITY, directory)
    for step in range(steps):
        ring.add(make_record(step))
    return ring


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def true_transitions(steps: int) -> set[tuple[float, float, float, bool]]:
    """List (obs, next obs, reward, terminal) by reading the streams letter by letter."""
    found = set()
    for env in range(E):
        for t in range(max(0, steps - ROWS), steps - 1):
            if STREAMS[env][t] not in "lt":
                now, after = 100.0 * (env + 1) + t, 100.0 * (env + 1) + t + 1
                found.add((now, after, after / 8, STREAMS[env][t + 1] == "t"))
    return found


def as_set(transition: replay.Transition, valid) -> set[tuple[float, float, float, bool]]:
    columns = transition.obs["time"], transition.next_obs["time"], transition.reward
    rows = zip(*(np.ravel(x) for x in (*columns, transition.is_terminal, valid)), strict=True)
    return {(float(a), float(b), float(r), bool(t)) for a, b, r, t, ok in rows if ok}


def test_the_ring_keeps_exactly_the_newest_rows():
    for steps in (0, 1, 5, 8, 9, 14):
        ring = ring_after(steps)
        assert int(ring.head) == steps % ROWS
        assert int(ring.size) == min(steps, ROWS)
        for step in range(max(0, steps - ROWS), steps):
            row = jax.tree.map(lambda x, t=step: x[:, t % ROWS], ring.record)
            assert_same(row, make_record(step))


@pytest.mark.parametrize("steps", [2, 7, 8, 11, 14])
def test_all_yields_every_transition_once_and_no_other(steps):
    batch = sample(ring_after(steps), jax.random.key(0), ALL)
    transition, valid = jax.jit(replay.transitions)(batch)
    assert valid.shape == (E * ROWS,)
    assert transition.action.shape == (E * ROWS, 2)
    expected = true_transitions(steps)
    assert as_set(transition, valid) == expected
    assert int(valid.sum()) == len(expected)
    np.testing.assert_array_equal(transition.action[:, 0], transition.obs["time"])


def test_a_truncated_episode_ends_without_a_terminal_transition():
    ring = ring_after(8)  # environment 0 is truncated at t = 3, environment 1 ends at 2 and 7
    transition, valid = replay.transitions(replay.sample(ring, jax.random.key(0), ALL))
    found = {(a, b): terminal for a, b, _, terminal in as_set(transition, valid)}
    assert found[(102.0, 103.0)] is False
    assert (103.0, 104.0) not in found
    assert found[(201.0, 202.0)] is True
    assert (202.0, 203.0) not in found


def test_a_stream_that_breaks_without_its_flags_yields_no_transition_there():
    # A restarted environment begins (`is_first`) although its last record never came, or
    # its last record is followed by one whose `is_first` was lost.
    ring = ring_after(8)
    flags = {"is_first": jnp.zeros((E, ROWS), bool), "is_last": jnp.zeros((E, ROWS), bool)}
    for name, at, lost in (("is_first", 5, 4), ("is_last", 2, 2)):
        broken = flags | {name: flags[name].at[1, at].set(True)}
        ring = ring._replace(record=ring.record._replace(**broken))
        _, valid = replay.transitions(replay.sample(ring, jax.random.key(0), ALL))
        expected = np.ones((E, ROWS), bool)
        expected[:, 7] = expected[1, lost] = False
        np.testing.assert_array_equal(valid, expected.reshape(-1))
        pairs = sample(ring, jax.random.key(0), SEQUENCES._replace(length=2))
        transition, valid = replay.transitions(pairs)
        np.testing.assert_array_equal(valid, transition.obs["time"] != 200.0 + lost)


@pytest.mark.parametrize("steps", [6, 8, 11])
def test_pairs_are_the_true_transitions(steps):
    spec = SEQUENCES._replace(length=2)
    batch = sample(ring_after(steps), jax.random.key(1), spec)
    transition, valid = replay.transitions(batch)
    assert valid.shape == (3, 50)
    assert transition.obs["image"].shape == (3, 50, 2, 2)
    # 150 draws out of at most 14 windows meet every one of them.
    assert as_set(transition, valid) == true_transitions(steps)
    assert not bool(valid.all())  # some pairs join two episodes


def test_sequences_are_consecutive_and_uniform_over_all_windows():
    spec = SEQUENCES._replace(updates=40, batch_size=300)
    for steps in (6, 11):
        batch = sample(ring_after(steps), jax.random.key(steps), spec)
        time = np.asarray(batch.record.obs["time"])
        assert time.shape == (40, 300, 3)
        assert np.all(np.diff(time, axis=-1) == 1.0)
        assert bool(batch.valid.all())
        oldest = max(0, steps - ROWS)
        starts = range(oldest, steps - 2)
        windows = [100.0 * (env + 1) + t for env in range(E) for t in starts]
        counts = np.array([np.sum(time[..., 0] == w) for w in windows])
        assert counts.sum() == 12000
        expected = 12000 / len(windows)
        chi_square = np.sum((counts - expected) ** 2 / expected)
        # The 0.9999 quantile for 11 degrees of freedom (12 windows; fewer: smaller still).
        assert chi_square < 37.4


PRIORITIZED = SEQUENCES._replace(updates=40, batch_size=300, priority="priority")


def with_priorities(steps: int, priority: np.ndarray) -> replay.Ring:
    """A ring whose priorities are given by age, oldest first, [E, ROWS]."""
    ring = ring_after(steps)
    by_row = np.roll(priority.astype(np.float32), steps % ROWS, 1) if steps > ROWS else priority
    extras = {**ring.record.extras, "priority": jnp.asarray(by_row, jnp.float32)}
    return ring._replace(record=ring.record._replace(extras=extras))


@pytest.mark.parametrize("steps", [8, 11])
def test_priorities_say_how_often_windows_are_drawn_and_odds_undo_it(steps):
    priority = np.arange(1.0, 1 + E * ROWS).reshape(E, ROWS)
    priority[0, 2] = 0.0
    batch = sample(with_priorities(steps, priority), jax.random.key(steps), PRIORITIZED)
    windows = ROWS - 2  # the newest two records start no whole window, whatever they weigh
    chance = priority[:, :windows] / priority[:, :windows].sum()
    time = np.asarray(batch.record.obs["time"])[..., 0]
    env, age = (time // 100 - 1).astype(int), (time % 100).astype(int) - (steps - ROWS)
    counts = np.zeros((E, windows))
    np.add.at(counts, (env, age), 1)
    assert counts[0, 2] == 0
    expected = 12000 * chance[chance > 0]
    chi_square = np.sum((counts[chance > 0] - expected) ** 2 / expected)
    assert chi_square < 35.6  # the 0.9999 quantile for 10 degrees of freedom
    np.testing.assert_allclose(batch.odds, (chance * E * windows)[env, age], rtol=1e-5)
    # Importance weights make the mean over all windows of it: here, of 1.
    np.testing.assert_allclose(np.mean(1.0 / batch.odds), (chance > 0).mean(), rtol=0.05)


def test_without_any_priority_all_windows_are_alike():
    for nothing in (np.zeros((E, ROWS)), np.full((E, ROWS), np.nan)):
        batch = sample(with_priorities(8, nothing), jax.random.key(0), PRIORITIZED)
        np.testing.assert_array_equal(batch.odds, 1.0)
        assert len(np.unique(np.asarray(batch.record.obs["time"])[..., 0])) == E * (ROWS - 2)
    assert sample(ring_after(8), jax.random.key(0), SEQUENCES).odds is None


def test_priorities_on_the_host_are_those_of_the_device():
    ring = with_priorities(11, np.arange(1.0, 1 + E * ROWS).reshape(E, ROWS))
    host = host_after(11)
    host.restore(ring)
    key = jax.random.key(4)
    assert_same(host.sample(key, PRIORITIZED), sample(ring, key, PRIORITIZED))
    with pytest.raises(ValueError, match="the extras have no entry 'weight', only"):
        host.sample(key, PRIORITIZED._replace(priority="weight"))


def test_importance_weights_are_at_most_one():
    np.testing.assert_allclose(
        replay.importance(jnp.array([0.5, 2.0, 8.0]), 1.0), [1, 0.25, 0.0625]
    )
    np.testing.assert_allclose(replay.importance(jnp.array([0.5, 2.0, 8.0]), 0.5), [1, 0.5, 0.25])
    assert replay.importance(None, 1.0) == 1.0


def test_index_is_the_address_of_the_first_record():
    ring = ring_after(11)
    batch = sample(ring, jax.random.key(3), SEQUENCES)
    assert batch.index is not None
    assert batch.index.shape == (3, 50, 2)
    assert batch.index.dtype == jnp.int32
    env, row = np.moveaxis(np.asarray(batch.index), -1, 0)
    np.testing.assert_array_equal(
        np.asarray(ring.record.obs["time"])[env, row], batch.record.obs["time"][..., 0]
    )


def test_latest_is_in_the_order_of_time_with_missing_rows_marked():
    for steps in (3, 5, 11):
        batch = sample(ring_after(steps), jax.random.key(0), LATEST)
        assert batch.index is None
        time = np.arange(steps - 5, steps)
        np.testing.assert_array_equal(batch.valid, np.broadcast_to(time >= 0, (E, 5)))
        got = np.asarray(batch.record.obs["time"]) - [[100.0], [200.0]]
        np.testing.assert_array_equal(got[batch.valid], np.tile(time[time >= 0], E))


def test_sequences_longer_than_the_data_are_marked_invalid():
    batch = sample(ring_after(2), jax.random.key(0), SEQUENCES)
    np.testing.assert_array_equal(batch.valid, np.broadcast_to([True, True, False], (3, 50, 3)))
    _, valid = replay.transitions(
        sample(ring_after(1), jax.random.key(0), SEQUENCES._replace(length=2))
    )
    assert not bool(valid.any())
    _, valid = replay.transitions(sample(ring_after(0), jax.random.key(0), ALL))
    assert not bool(valid.any())


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("steps", [2, 6, 8, 14])
def test_host_ring_equals_device_ring(steps, mapped, tmp_path):
    host = host_after(steps, tmp_path / "rîng store" if mapped else None)
    for seed, spec in enumerate((SEQUENCES, LATEST, ALL)):
        key = jax.random.key(seed)
        assert_same(host.sample(key, spec), sample(ring_after(steps), key, spec))
    assert host.size == min(steps, ROWS)


def test_host_batches_do_not_change_when_the_ring_is_written_on():
    host = host_after(8)
    before = [host.sample(jax.random.key(0), spec) for spec in (SEQUENCES, LATEST, ALL)]
    copies = jax.tree.map(np.array, before)
    for step in range(8, 14):
        host.add(make_record(step))
    assert_same(before, copies)


def test_host_state_moves_between_rings(tmp_path):
    host, device = host_after(11), ring_after(11)
    assert_same(host.state(), device)
    mapped = replay.HostRing(EXAMPLE, E, CAPACITY, tmp_path)
    mapped.restore(device)
    for step in (11, 12):
        mapped.add(make_record(step))
        host.add(make_record(step))
    assert_same(mapped.state(), host.state())
    assert_same(mapped.state(), ring_after(13))
    with pytest.raises(ValueError, match=r"ring\.record\.reward: expected float32 \(2, 8\)"):
        mapped.restore(device._replace(record=device.record._replace(reward=np.zeros((2, 9)))))


def test_memory_maps_have_their_space_on_the_disk_before_they_are_used(tmp_path, monkeypatch):
    first = host_after(3, tmp_path)
    for file in tmp_path.iterdir():
        assert file.stat().st_blocks * 512 >= file.stat().st_size
    # A second ring in the same folder takes the names, not the storage.
    replay.HostRing(EXAMPLE, E, CAPACITY, tmp_path)
    assert_same(first.state(), ring_after(3))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        replay.HostRing(EXAMPLE, E, CAPACITY, tmp_path)


def test_a_ring_over_given_arrays_writes_into_them():
    storage = jax.tree.map(lambda x: np.zeros((E, ROWS, *x.shape), x.dtype), EXAMPLE)
    ring = replay.HostRing.over(storage)
    for step in range(11):
        ring.add(make_record(step))
    assert_same(ring.state(), ring_after(11))
    assert_same(storage, ring_after(11).record)


def test_host_ring_stores_small_floats_in_memory_maps(tmp_path):
    example = EXAMPLE._replace(extras={"h": jax.ShapeDtypeStruct((3,), jnp.bfloat16)})
    ring = replay.HostRing(example, E, CAPACITY, tmp_path)
    record = make_record(0)._replace(extras={"h": jnp.full((E, 3), 1.5, jnp.bfloat16)})
    ring.add(record)
    stored = ring.state().record.extras["h"]
    assert stored.dtype == jnp.bfloat16
    assert float(stored[1, 0, 2]) == 1.5
    assert len(list(tmp_path.glob("*.npy"))) == len(jax.tree.leaves(example))


def test_write_back_lands_on_the_sampled_records_and_the_last_of_a_batch_wins():
    ring, host = ring_after(11), host_after(11)
    batch = sample(ring, jax.random.key(5), SEQUENCES)
    new = np.random.default_rng(0).standard_normal((3, 50, 3, 2)).astype(np.float32)
    values = {"latent": {"h": new}}
    written = write_back(ring, batch.index, values)
    expected = np.zeros((E, ROWS, 2), np.float32)
    for k, b in np.ndindex(3, 50):
        env, row = np.asarray(batch.index)[k, b]
        for t in range(3):
            expected[env, (row + t) % ROWS] = new[k, b, t]
    np.testing.assert_array_equal(written.record.extras["latent"]["h"], expected)
    untouched = written.record._replace(extras=ring.record.extras)
    assert_same(untouched, ring.record)
    assert_same(written.record.extras["priority"], ring.record.extras["priority"])
    host.write_back(batch.index, values)
    assert_same(host.state(), written)
    assert_same(replay.write_back(ring, None, None), ring)


def test_write_back_refuses_what_does_not_fit():
    ring = ring_after(11)
    index = jnp.zeros((4, 2), jnp.int32)
    with pytest.raises(ValueError, match="no entry 'td'"):
        replay.write_back(ring, index, {"td": jnp.zeros((4, 3))})
    with pytest.raises(ValueError, match=r"extras.latent has no entry 'z'.*\['h'\]"):
        replay.write_back(ring, index, {"latent": {"z": jnp.zeros((4, 3))}})
    with pytest.raises(ValueError, match=r"extras.latent.h expected the shape \(4, 'T', 2\)"):
        host_after(3).write_back(index, {"latent": {"h": np.zeros((4, 3))}})
    with pytest.raises(ValueError, match="index: got None"):
        replay.write_back(ring, None, {"priority": jnp.zeros((4, 3))})
    with pytest.raises(ValueError, match=r"extras.priority is stored as float32, got int32"):
        replay.write_back(ring, index, {"priority": jnp.zeros((4, 3), jnp.int32)})


def test_add_is_in_place_under_donation():
    donating = jax.jit(replay.add, donate_argnums=0)
    ring = donating(replay.init(EXAMPLE, E, CAPACITY), make_record(0))
    place = ring.record.obs["image"].unsafe_buffer_pointer()
    after = donating(ring, make_record(1))
    assert ring.record.obs["image"].is_deleted()
    assert after.record.obs["image"].unsafe_buffer_pointer() == place
    assert_same(after, ring_after(2))


def test_seeds_are_an_axis_of_everything():
    rings = jax.tree.map(lambda a, b: jnp.stack([a, b]), ring_after(6), ring_after(11))
    records = jax.tree.map(lambda a, b: jnp.stack([a, b]), make_record(6), make_record(11))
    keys = jax.random.split(jax.random.key(0), 2)

    def step(ring, record, key):
        ring = replay.add(ring, record)
        batch = replay.sample(ring, key, SEQUENCES)
        priority = batch.record.reward
        return replay.write_back(ring, batch.index, {"priority": priority}), batch

    rings, batches = jax.jit(jax.vmap(step))(rings, records, keys)
    for seed, steps in enumerate((7, 12)):
        ring = ring_after(steps)
        batch = sample(ring, keys[seed], SEQUENCES)
        assert_same(jax.tree.map(lambda x, s=seed: x[s], batches), batch)
        written = write_back(ring, batch.index, {"priority": batch.record.reward})
        assert_same(jax.tree.map(lambda x, s=seed: x[s], rings), written)


def test_holdout_is_fixed_and_has_its_share():
    mask = np.asarray(jax.jit(replay.holdout_mask, static_argnums=0)((50, 400), 0.1))
    assert abs(mask.mean() - 0.1) < 4 * np.sqrt(0.09 / mask.size)
    np.testing.assert_array_equal(mask, replay.holdout_mask((50, 400), 0.1))
    # Neighbours in time and across environments are independent.
    assert abs(np.mean(mask[:, 1:] & mask[:, :-1]) - 0.01) < 0.003
    assert abs(np.mean(mask[1:] & mask[:-1]) - 0.01) < 0.003
    assert not replay.holdout_mask((3, 5), 0.0).any()
    # A larger ratio only adds rows.
    assert np.all(mask <= np.asarray(replay.holdout_mask((50, 400), 0.2)))
    with pytest.raises(ValueError, match=r"ratio: expected a share in \[0, 1\), got 1.0"):
        replay.holdout_mask((3, 5), 1.0)


def test_records_that_do_not_fit_are_refused_by_name():
    ring, host = ring_after(0), host_after(0)
    good = make_record(0)
    for bad, match in (
        (good._replace(reward=np.zeros(3, np.float32)), r"record.reward: expected float32 \(2,\)"),
        (good._replace(is_last=np.zeros(E, np.int32)), r"record.is_last: expected bool"),
        (good._replace(obs={"time": good.obs["time"]}), "record: expected the structure"),
    ):
        for target in (ring, host):
            with pytest.raises(ValueError, match=match):
                replay.add(ring, bad) if target is ring else host.add(bad)
    with pytest.raises(ValueError, match="is_last: expected bool"):
        host.add(good._replace(is_last=np.zeros(E, np.float64)))
    with pytest.raises(ValueError, match=r"record.reward: expected float32 .* got float64"):
        host.add(good._replace(reward=np.zeros(E)))


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="raise --capacity to 8 or more"):
        replay.init(EXAMPLE, 4, 7)
    with pytest.raises(ValueError, match="num_envs: expected at least 1"):
        replay.HostRing(EXAMPLE, 0, 7)
    for call in (functools.partial(replay.sample, ring_after(8)), host_after(8).sample):
        with pytest.raises(ValueError, match="length: expected 1 to 8"):
            call(jax.random.key(0), SEQUENCES._replace(length=9))
        with pytest.raises(ValueError, match="kind: expected"):
            call(jax.random.key(0), SEQUENCES._replace(kind="newest"))  # type: ignore
    with pytest.raises(ValueError, match="need sequences of length 2, got length 3"):
        replay.transitions(sample(ring_after(8), jax.random.key(0), SEQUENCES))


def test_memory_is_counted_exactly_and_checked_before_it_is_taken():
    per_record = 4 + 4 + 2 * 4 + 4 + 3 + 4 + 2 * 4  # time image action reward flags priority h
    assert replay.nbytes(EXAMPLE, E, CAPACITY) == per_record * E * ROWS
    leaves = jax.tree.leaves(ring_after(0).record)
    assert sum(x.nbytes for x in leaves) == per_record * E * ROWS
    assert replay.check_memory(3 * 2**29, "replay", available=2**31) == "1.5 GiB"
    assert replay.check_memory(1000, "replay") == "1000 B"
    with pytest.raises(ValueError, match=r"replay needs 2.0 KiB, but only 2.0 KiB .*--capacity"):
        replay.check_memory(2049, "replay", available=2048)
    with pytest.raises(ValueError, match=r"replay needs 1024.0 TiB.*--capacity"):
        replay.check_memory(2**50, "replay")
    assert 2**20 < replay.host_memory() < 2**50


def test_the_space_of_a_disk_is_known_before_the_folder_is_made(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    found = replay.disk_space(tmp_path / "not" / "there")
    assert abs(found - free) < 2**30
    with pytest.raises(ValueError, match=r"replay needs 2.0 KiB, but only 1.0 KiB of the disk are"):
        replay.check_memory(2048, "replay", available=1024, where="the disk")


def test_the_default_check_asks_an_accelerator_for_its_own_limit(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 1000, "bytes_in_use": 400}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert replay.device_memory() == 600
    assert replay.check_memory(600, "replay") == "600 B"
    with pytest.raises(ValueError, match="only 600 B"):
        replay.check_memory(601, "replay")


def test_batch_of_all_is_the_ring_itself():
    ring = ring_after(8)
    batch = replay.sample(ring, jax.random.key(0), ALL)
    assert isinstance(batch, Batch)
    assert_same(batch.record, ring.record)
