"""The actor-critic of the RAMP-style policy, on episodes whose damages are known unit by unit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bitatlas.solvers.sac import Episodes, Mlp, Sac


def test_gradients_of_the_networks():
    rng = np.random.default_rng(0)
    net, x = Mlp((3, 5, 4, 2), rng), rng.normal(size=(7, 3))
    weight = rng.normal(size=(7, 2))

    def loss() -> float:
        return float((net.forward(x)[-1] * weight).sum())

    grads, into = net.backward(net.forward(x), weight)
    for array, grad in [(net.params[k], grads[k]) for k in net.params] + [(x, into)]:
        flat, expected = array.reshape(-1), grad.reshape(-1)
        for i in rng.choice(flat.size, min(4, flat.size), replace=False):
            kept = flat[i]
            flat[i] = kept + 1e-5
            up = loss()
            flat[i] = kept - 1e-5
            assert expected[i] == pytest.approx((up - loss()) / 2e-5, rel=1e-5, abs=1e-8)
            flat[i] = kept


def _true_log_damage(state: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Steep in the first feature, and a bit saves less than a critic is born with."""
    return 2.0 * state[..., 0] - 0.9 * bits


def _episodes(rng: np.random.Generator, episodes: int, units: int = 30) -> Episodes:
    state = np.broadcast_to(rng.uniform(-1, 1, (units, 3)), (episodes, units, 3))
    bits = rng.integers(2, 7, (episodes, units)).astype(float)
    size = rng.lognormal(0, 0.5, units)
    weight = size / size.sum()
    target = np.log((np.exp(_true_log_damage(state, bits)) * weight).sum(axis=1)) + 5.0  # any level
    return Episodes(state, bits, target, np.full(units, 2.0), np.full(units, 6.0), weight, 3.5)


def _taught(seed: int = 0, steps: int = 500) -> Sac:
    """A learner of episodes over three sets of units."""
    rng = np.random.default_rng(seed)
    learner = Sac(3, 16, rng, lr=3e-3)
    known = [_episodes(rng, 48) for _ in range(3)]
    for i in range(steps):
        e, at = known[i % 3], rng.integers(48, size=16)
        batch = replace(e, state=e.state[at], bits=e.bits[at], target=e.target[at])
        learner.criticise(batch)
        learner.improve(batch, rng)
    return learner


@pytest.fixture(scope="module")
def taught() -> Sac:
    return _taught()


def test_one_return_an_episode_credits_every_unit(taught):
    """Units never met: the critics know from whole episodes what each unit's own format does."""
    new = _episodes(np.random.default_rng(99), 20)
    true = _true_log_damage(new.state, new.bits)
    fresh = Sac(3, 16, np.random.default_rng(1))
    for name in ("damage0", "damage1"):
        shares = {}
        for label, learner in (("taught", taught), ("fresh", fresh)):
            _, share, _ = learner._damage(name, new, new.bits)
            log = np.log(share / new.weight)
            # What is left once bits are accounted for is what the unit's own features say.
            shares[label] = np.corrcoef((log + 0.9 * new.bits).ravel(), (true + 0.9 * new.bits).ravel())[0, 1]
        assert shares["taught"] > 0.9
        assert shares["fresh"] < 0.5


def test_the_actor_gives_bits_to_sensitive_units_and_wants_the_budget(taught):
    new = _episodes(np.random.default_rng(98), 1, units=200)
    bits = 2 + (taught.act(new.state[0], None) + 1) * 2
    assert np.corrcoef(bits, new.state[0, :, 0])[0, 1] > 0.9
    assert bits @ new.weight == pytest.approx(new.budget, rel=0.1)
    flat = np.full(200, bits @ new.weight)

    def damage(given: np.ndarray) -> float:
        return float(np.exp(_true_log_damage(new.state[0], given)) @ new.weight)

    assert damage(bits) < 0.75 * damage(flat)


@pytest.mark.parametrize(("limits", "side"), [((-1.0, 0.5), 1), ((20.0, 30.0), -1)])
def test_a_price_that_cannot_fall_or_rise_misses_the_budget(limits, side):
    """The price is the reward's own slope: where that is too flat, wanting too much pays."""
    rng = np.random.default_rng(0)
    e, learner = _episodes(rng, 16), Sac(3, 16, rng, price=limits)
    for _ in range(150):
        learner.improve(e, rng)
    assert limits[0] <= float(learner.price["bytes"]) <= limits[1]
    wanted = 2 + (learner.act(e.state[0], None) + 1) * 2
    assert side * (wanted @ e.weight - e.budget) > 0.5


def test_slopes_of_the_damage(taught):
    e = _episodes(np.random.default_rng(3), 2, units=5)
    bits = e.bits + 0.3
    _, slope = taught._slopes("damage0", e, bits)
    for i in range(5):
        step = np.zeros(5)
        step[i] = 1e-5
        up, down = (taught._damage("damage0", e, bits + s)[0] for s in (step, -step))
        np.testing.assert_allclose(slope[:, i], (up - down) / 2e-5, rtol=1e-5, atol=1e-9)


def test_noise_is_standard_and_partly_shared_by_units_that_look_alike():
    learner, rng = Sac(2, 32, np.random.default_rng(0)), np.random.default_rng(1)
    state = np.array([[1.0, 0.5], [1.0, 0.5], [-1.0, -0.5]])
    drawn = []
    for _ in range(4000):
        turn = np.broadcast_to(rng.normal(size=32), (3, 32))
        drawn.append(np.arctanh(learner.act(state, rng.normal(size=3), turn)))
    mean, log_std, _ = learner._policy(state)
    z = (np.array(drawn) - mean) / np.exp(log_std)
    np.testing.assert_allclose(z.std(axis=0), 1.0, atol=0.05)
    assert np.corrcoef(z[:, 0], z[:, 1])[0, 1] == pytest.approx(0.5, abs=0.05)
    assert np.corrcoef(z[:, 0], z[:, 2])[0, 1] < -0.4


def test_it_goes_on_from_its_arrays(taught):
    again, e = Sac(3, 16, np.random.default_rng(9), lr=3e-3), _episodes(np.random.default_rng(4), 8)
    again.restore(taught.arrays())
    other = Sac(3, 16, np.random.default_rng(8), lr=3e-3)
    other.restore(again.arrays())
    for learner in (again, other):
        rng = np.random.default_rng(7)
        learner.criticise(e)
        learner.improve(e, rng)
    one, two = again.arrays(), other.arrays()
    assert one.keys() == two.keys()
    assert all((one[k] == two[k]).all() for k in one)
    assert any((one[k] != v).any() for k, v in taught.arrays().items())  # it did learn on


def test_a_cliff_at_the_budget_keeps_the_policy_below_it():
    """The step of the reward is felt through the spread of what the policy asks for: the higher, the further it stays away."""
    wanted = []
    for cliff in (0.0, 1.0, 1000.0):
        rng = np.random.default_rng(0)
        e, learner = _episodes(rng, 16), Sac(3, 16, rng, lr=3e-3, cliff=cliff)
        tail = []
        for i in range(400):
            learner.improve(e, rng)
            if i >= 300:
                bits = 2 + (learner.act(e.state[0], None) + 1) * 2
                tail.append(bits @ e.weight / e.budget)
        wanted.append(np.mean(tail))
    assert wanted[0] == pytest.approx(1.0, abs=0.02)
    assert wanted[0] > wanted[1] + 0.01
    assert wanted[1] > wanted[2] + 0.01
