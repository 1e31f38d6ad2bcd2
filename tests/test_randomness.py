import numpy as np
import pytest

from stdit_fast.train.randomness import hash_uniform, sample_rng


def test_sample_rng_repeats_for_the_same_key():
    a = sample_rng(3, 1, 17, "noise").standard_normal(100)
    sample_rng(3, 1, 18, "noise").standard_normal(7)
    np.testing.assert_array_equal(a, sample_rng(3, 1, 17, "noise").standard_normal(100))


@pytest.mark.parametrize(
    "other", [(4, 1, 17, "noise"), (3, 2, 17, "noise"), (3, 1, 18, "noise"), (3, 1, 17, "crop"), (3, 11, 7, "noise")]
)
def test_sample_rng_differs_for_another_key(other):
    a = sample_rng(3, 1, 17, "noise").standard_normal(2000)
    b = sample_rng(*other).standard_normal(2000)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1


def test_sample_rng_takes_integers_of_any_size_and_kind():
    assert sample_rng(2**80, 0, 0, "x").random() != sample_rng(2**80 + 2**70, 0, 0, "x").random()
    assert sample_rng(np.int64(5), np.int32(1), np.int64(2), "x").random() == sample_rng(5, 1, 2, "x").random()


def test_hash_uniform_is_uniform_and_independent_of_its_neighbours():
    u = hash_uniform(0, 0, np.arange(400_000), 0)
    assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    chi_square = ((counts - 4000.0) ** 2 / 4000).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_hash_uniform_streams_are_independent(other):
    samples = np.arange(100_000)
    seed, epoch, stream = other
    a, b = hash_uniform(0, 0, samples, 0), hash_uniform(seed, epoch, samples, stream)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert (a == b).mean() < 1e-3


def test_hash_uniform_of_chunks_and_of_another_order_is_the_same():
    samples = np.random.default_rng(0).permutation(10_000)
    whole = hash_uniform(9, 4, np.arange(10_000), 2)
    np.testing.assert_array_equal(whole[samples], hash_uniform(9, 4, samples.astype(np.int32), 2))
    parts = [hash_uniform(9, 4, part, 2) for part in np.array_split(np.arange(10_000), 7)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_hash_uniform_matches_a_scalar_computation():
    word = 2**64

    def mix(z):
        z %= word
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % word
        return z ^ (z >> 31)

    base = 0
    for key in (12, 3, 1):
        base = mix(base + 0x9E3779B97F4A7C15 + key)
    sample = 123_456_789
    expected = (mix(mix(sample * 0x9E3779B97F4A7C15 + base) ^ base) >> 11) / 2**53
    assert hash_uniform(12, 3, np.array(sample), 1) == expected
    assert hash_uniform(12, 3, np.array([sample]), 1).tolist() == [expected]
