"""Power-function averages against sums over whole trajectories, integrals on a grid, and the numbers of the paper."""

import numpy as np
import pytest
import torch

from tessera import power_ema
from tessera.errors import TesseraError
from tessera.power_ema import MAX_LENGTH, Profile, Stored, fit, gamma, new_weight

GRID = (np.arange(1_000_000) + 0.5) / 1_000_000  # midpoints of steps / last step


def direct(trajectory: np.ndarray, length: float) -> np.ndarray:
    """The average after the last step by its profile, integrated over each step."""
    edges = np.arange(len(trajectory) + 1) / len(trajectory)
    return np.diff(edges ** (gamma(length) + 1)) @ trajectory


def averages(trajectory: np.ndarray, length: float) -> np.ndarray:
    """The average after each step, from the one before."""
    rows, average = [], np.zeros(trajectory.shape[1])
    for step, weights in enumerate(trajectory, start=1):
        average = average + new_weight(length, step) * (weights - average)
        rows.append(average)
    return np.stack(rows)


def random_trajectory(steps: int, noise: float) -> np.ndarray:
    """Weights that move along a curve, with noise around it: [steps, 200]"""
    generator, time = np.random.default_rng(0), np.linspace(0, 1, steps)[:, None]
    start, drift, wave = generator.standard_normal((3, 200))
    curve = start + 3 * drift * np.sqrt(time) + wave * np.sin(2 * np.pi * time)
    return curve + noise * generator.standard_normal((steps, 200))


def test_the_exponents_are_those_of_the_paper():
    """Section 3.1: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_length_is_the_standard_deviation_of_the_profile(length):
    profile = (gamma(length) + 1) * GRID ** gamma(length)
    mean = (profile * GRID).mean()
    assert profile.mean() == pytest.approx(1, rel=1e-6)
    assert np.sqrt((profile * (GRID - mean) ** 2).mean()) == pytest.approx(length, rel=1e-5)


def test_the_longest_average_is_the_mean_of_all_weights():
    trajectory = random_trajectory(30, 1)
    assert gamma(MAX_LENGTH) == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(averages(trajectory, MAX_LENGTH)[-1], trajectory.mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.25])
def test_the_updates_add_up_to_the_closed_form_of_the_profile(length):
    trajectory = random_trajectory(300, 1)
    np.testing.assert_allclose(averages(trajectory, length)[-1], direct(trajectory, length), rtol=0, atol=1e-12)


def test_products_of_profiles_are_integrals():
    profiles = [Profile(100, 0.05), Profile(100, 0.1), Profile(37, 0.05), Profile(80, 0.28)]
    steps = GRID * 100

    def values(profile: Profile) -> np.ndarray:
        inside = np.where(steps <= profile.step, steps / profile.step, 0)
        return (gamma(profile.length) + 1) * inside ** gamma(profile.length) / profile.step

    expected = [[(values(one) * values(other)).mean() * 100 for other in profiles] for one in profiles]
    np.testing.assert_allclose(power_ema.inner_products(profiles, profiles), expected, rtol=1e-4)


@pytest.mark.parametrize(("length", "limit"), [(0.03, 0.02), (0.05, 0.002), (0.08, 0.002), (0.15, 0.004), (0.2, 0.01)])
def test_an_average_of_another_length_is_near_the_one_that_was_accumulated(length, limit):
    """Relative to the distance between the average and the last weights: what averaging changes. 32 snapshots."""
    trajectory = random_trajectory(1600, 0.3)
    rows = {each: averages(trajectory, each) for each in (0.051, 0.1)}
    stored = [Profile(step, each) for step in range(50, 1601, 50) for each in rows]
    factors, error = fit(stored, Profile(1600, length))
    expected = averages(trajectory, length)[-1]
    computed = factors @ [rows[profile.length][profile.step - 1] for profile in stored]
    change = np.linalg.norm(expected - trajectory[-1])
    assert np.linalg.norm(computed - expected) < limit * change
    assert error < 2 * limit
    nearest = min(np.linalg.norm(each[-1] - expected) for each in rows.values())  # of those that are stored
    assert np.linalg.norm(computed - expected) < nearest / 5


def test_factors_keep_constant_weights_and_take_a_stored_average_as_it_is():
    stored = [Profile(step, length) for step in range(10, 321, 10) for length in (0.05, 0.1)]
    for length in (0.03, 0.07, 0.2):
        assert fit(stored, Profile(320, length))[0].sum() == pytest.approx(1, abs=1e-10)
    for number, profile in enumerate(stored):
        factors, error = fit(stored, profile)
        assert error == 0
        np.testing.assert_array_equal(factors, np.arange(len(stored)) == number)


def test_more_snapshots_give_more_lengths():
    limits = []
    for count in (1, 4, 8, 32):
        stored = [Profile(1600 * (number + 1) // count, each) for number in range(count) for each in (0.05, 0.1)]
        lengths = power_ema.possible_lengths(stored, 1600)
        assert {0.05, 0.1} <= set(lengths)
        limits.append((lengths[0], lengths[-1]))
    assert limits[-1][0] <= 0.02
    assert limits[-1][1] >= 0.25
    assert [low for low, _ in limits] == sorted((low for low, _ in limits), reverse=True)
    assert [high for _, high in limits] == sorted(high for _, high in limits)


# Files


def test_before_any_training_no_length_is_computed():
    assert power_ema.possible_lengths([Profile(0, 0.05), Profile(0, 0.1)], 0) == []


def test_a_snapshot_is_read_back_and_a_partial_one_is_not(tmp_path):
    states = {0.05: {"a": torch.randn(3, 2), "b": torch.randn(())}, 0.1: {"a": torch.randn(3, 2), "b": torch.randn(())}}
    for step in (2, 4, 6):
        power_ema.write_snapshot(states, tmp_path, step)
    path = power_ema.snapshot_path(tmp_path, 4)
    path.rename(f"{path}.partial")
    stored = power_ema.snapshots(tmp_path, before=6)
    assert list(stored) == [Profile(2, 0.05), Profile(2, 0.1)]
    combined = power_ema.combine({stored[Profile(2, 0.05)]: 0.25, stored[Profile(2, 0.1)]: 0.75})
    for name in ("a", "b"):
        torch.testing.assert_close(combined[name], 0.25 * states[0.05][name] + 0.75 * states[0.1][name])
    alone = power_ema.combine({stored[Profile(2, 0.1)]: 1.0})
    assert all(torch.equal(alone[name], tensor) for name, tensor in states[0.1].items())
    power_ema.delete_snapshots_after(tmp_path, 2)
    assert list(power_ema.snapshot_files(tmp_path)) == [2]


def test_weights_that_do_not_change_keep_their_bits(tmp_path):
    weights = torch.randn(1000)
    for step in range(1, 17):
        power_ema.write_snapshot({0.05: {"frozen": weights}, 0.1: {"frozen": weights.clone()}}, tmp_path, step)
    stored = power_ema.snapshots(tmp_path, before=17)
    factors, _ = fit(list(stored), Profile(16, 0.03))
    assert np.abs(factors).sum() > 5
    assert torch.equal(power_ema.combine(dict(zip(stored.values(), factors)))["frozen"], weights)


def test_damaged_and_different_files_are_errors(tmp_path):
    power_ema.write_snapshot({0.1: {"a": torch.ones(2)}}, tmp_path, 1)
    power_ema.write_snapshot({0.1: {"a": torch.ones(3)}}, tmp_path, 2)
    one, two = (Stored(power_ema.snapshot_path(tmp_path, step), "0.1/") for step in (1, 2))
    with pytest.raises(TesseraError, match="step-000000002.safetensors holds other weights than .*000001"):
        power_ema.combine({one: 0.5, two: 0.5})
    two.path.write_bytes(two.path.read_bytes()[:-4])
    with pytest.raises(TesseraError, match="step-000000002.safetensors is damaged.*remove it"):
        power_ema.snapshots(tmp_path, before=3)


def test_a_snapshot_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / power_ema.SNAPSHOTS).write_text("a file")
    with pytest.raises(TesseraError, match="cannot write .*step-000000001"):
        power_ema.write_snapshot({0.1: {"a": torch.ones(2)}}, tmp_path, 1)
