"""The learner of the RAMP-style policy in NumPy: twin critics of damage per unit, a squashed Gaussian actor, Adam.

An episode has one return for all its units. Fitted to it unit by unit, a critic learns the same mean everywhere and its slope
in a unit's own action is noise. Here the *sum* of a critic's damages is fitted to the episode's KL (value decomposition; VDN,
Sunehag et al. 2018; a sum is monotone in its parts, QMIX, Rashid et al. 2018), so that each unit is credited with its share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Adam", "Episodes", "Mlp", "Sac"]

_LOG_STD = (-5.0, 2.0)
_PER_BIT = float(np.log(4))
"""One bit less makes a quantisation error's square four times as large: what a critic knows before it has seen anything."""

_ENTROPY = 0.0
"""Of an action, aimed at by the temperature: a spread of half a bit or more, else no unit changes its format and nothing is told."""
_RESTORING, _INTEGRAL = 20.0, 0.1
"""Price of the bytes per share wanted too much: at once, and a step. Without the first it overshoots and swings."""
_LEAST_SPREAD = 0.01
"""Of the bytes of episodes, as a share of the budget: a policy without noise would see no cliff until it is over it."""


class Mlp:
    """tanh layers, linear output; parameters in one dict, so that they can be saved. ``last`` scales the first output weights."""

    def __init__(self, sizes: tuple[int, ...], rng: np.random.Generator, last: float = 1.0) -> None:
        self.depth = len(sizes) - 1
        self.params: dict[str, np.ndarray] = {}
        for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
            scale = last if i == self.depth - 1 else 1.0
            self.params[f"w{i}"] = rng.normal(size=(fan_in, fan_out)) * scale / np.sqrt(fan_in)
            self.params[f"b{i}"] = np.zeros(fan_out)

    def forward(self, x: np.ndarray) -> list[np.ndarray]:
        """Inputs of every layer and the output, (N, .) each."""
        out = [x]
        for i in range(self.depth):
            y = out[-1] @ self.params[f"w{i}"] + self.params[f"b{i}"]
            out.append(np.tanh(y) if i < self.depth - 1 else y)
        return out

    def backward(
        self, layers: list[np.ndarray], grad: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Gradients of the parameters and of the input, from the output's (N, .)."""
        out: dict[str, np.ndarray] = {}
        for i in reversed(range(self.depth)):
            if i < self.depth - 1:
                grad = grad * (1 - layers[i + 1] ** 2)
            out[f"w{i}"] = layers[i].T @ grad
            out[f"b{i}"] = grad.sum(axis=0)
            grad = grad @ self.params[f"w{i}"].T
        return out, grad


class Adam:
    """Adam over a dict of arrays (Kingma & Ba 2015); changes them in place."""

    def __init__(self, params: dict[str, np.ndarray], lr: float) -> None:
        self.params, self.lr, self.count = params, lr, 0
        self.first = {k: np.zeros_like(v) for k, v in params.items()}
        self.second = {k: np.zeros_like(v) for k, v in params.items()}

    def step(self, grads: Mapping[str, np.ndarray]) -> None:
        """Descend."""
        self.count += 1
        for k, g in grads.items():
            self.first[k] += 0.1 * (g - self.first[k])
            self.second[k] += 0.001 * (g**2 - self.second[k])
            first = self.first[k] / (1 - 0.9**self.count)
            second = self.second[k] / (1 - 0.999**self.count)
            self.params[k] -= self.lr * first / (np.sqrt(second) + 1e-8)


@dataclass(frozen=True)
class Episodes:
    """A batch of whole episodes over the same units.

    Attributes:
        state: (E, C, S) what the policy saw. bits: (E, C) effective bits that each unit was given. target: (E,) log of the measured KL.
        low, high: (C,) bits of a unit's smallest and largest format. weight: (C,) its share of the weights.
        budget: effective bits per weight that the budget pays for.
    """

    state: np.ndarray
    bits: np.ndarray
    target: np.ndarray
    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray
    budget: float


class Sac:
    """Soft actor-critic on episodes whose return is -log(sum of damages) - price * (bytes / budget - 1).

    Args:
        features: length of a state; hidden: width of the two hidden layers.
        rng: of the first weights. lr: of all networks and the temperature.
        price: (least, most) nats that using the whole budget once more may cost: the reward's slopes below and beyond it.
    """

    def __init__(
        self, features: int, hidden: int, rng: np.random.Generator, lr: float = 3e-3,
        price: tuple[float, float] = (-1.0, 10.0), cliff: float = 0.0,
    ) -> None:  # fmt: skip
        self.nets = {
            "actor": Mlp((features, hidden, hidden, 2), rng, last=0.1),
            "damage0": Mlp((features + 1, hidden, hidden, 1), rng, last=0.1),
            "damage1": Mlp((features + 1, hidden, hidden, 1), rng, last=0.1),
        }
        self.temperature = {"log": np.array(np.log(0.03))}
        self.adams = {name: Adam(net.params, lr) for name, net in self.nets.items()}
        self.adams["temperature"] = Adam(self.temperature, lr)
        self.price = {"bytes": np.zeros(())}
        self.hidden, self._limits, self._cliff = hidden, price, cliff

    def act(self, state: np.ndarray, noise: np.ndarray | None, turn: np.ndarray | None = None) -> np.ndarray:
        """(N,) actions in (-1, 1) of states (N, features).

        Args:
            noise: (N,) standard normal, None = the mean action.
            turn: (N, hidden) standard normal, the same in a whole episode: half of the noise's variance is then a function of the
                state (generalised state-dependent exploration, Raffin et al. 2021), so that units that look alike move together.
        """
        mean, log_std, layers = self._policy(state)
        if noise is None:
            return np.tanh(mean)
        if turn is not None:
            last = layers[-2]
            alike = (last * turn).sum(axis=1) / np.maximum(np.linalg.norm(last, axis=1), 1e-9)
            noise = np.sqrt(0.5) * (noise + alike)
        return np.tanh(mean + np.exp(log_std) * noise)

    def _policy(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        layers = self.nets["actor"].forward(state)
        return layers[-1][:, 0], np.clip(layers[-1][:, 1], *_LOG_STD), layers

    def _damage(
        self, name: str, e: Episodes, bits: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """(E,) log of an episode's summed damage, (E, C) each unit's share of it, and the network's layers."""
        seen = np.concatenate([e.state, bits[..., None] / 8], -1).reshape(-1, e.state.shape[-1] + 1)
        layers = self.nets[name].forward(seen)
        log = layers[-1][:, 0].reshape(bits.shape) - _PER_BIT * bits + np.log(e.weight)
        top = log.max(axis=1, keepdims=True)
        part = np.exp(log - top)
        total = part.sum(axis=1, keepdims=True)
        return (top + np.log(total))[:, 0], part / total, layers

    def _slopes(self, name: str, e: Episodes, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(E,) log of the summed damage, and (E, C) its derivative with respect to every unit's bits."""
        log, share, layers = self._damage(name, e, bits)
        into = self.nets[name].backward(layers, np.ones((bits.size, 1)))[1][:, -1].reshape(bits.shape) / 8
        return log, share * (into - _PER_BIT)

    def criticise(self, e: Episodes) -> float:
        """One step of the critics; returns their mean squared error.

        The error is centred within the batch: a level common to all episodes says nothing about any unit.
        """
        error = 0.0
        for name in ("damage0", "damage1"):
            found, share, layers = self._damage(name, e, e.bits)
            off = found - e.target
            off -= off.mean()
            error += float((off**2).mean()) / 2
            grad = 2 * off[:, None] / len(off) * share
            self.adams[name].step(self.nets[name].backward(layers, grad.reshape(-1, 1))[0])
        return error

    def improve(self, e: Episodes, rng: np.random.Generator) -> None:
        """One step of the actor, the temperature and the price on the states of episodes.

        Of the critics the one that sees more damage in an episode counts (the smaller Q). The bytes need no critic: their slope in
        every action is known. The price of the bytes is the slope of the reward at the budget, which lies between those on its two
        sides; it rises while the policy wants more than the budget. The cliff itself has no slope, but its expectation under the
        policy's own spread has one: cliff * Phi(over / spread), with the share of an episode's bytes taken as Gaussian.
        """
        shape = e.bits.shape
        n = shape[0] * shape[1]
        mean, log_std, layers = self._policy(e.state.reshape(n, -1))
        noise = rng.normal(size=n)
        scaled = np.exp(log_std) * noise
        a = np.tanh(mean + scaled)
        log_pi = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - np.log(np.maximum(1 - a**2, 1e-6))
        span = (e.high - e.low) / 2
        bits = e.low + (a.reshape(shape) + 1) * span
        one, two = self._slopes("damage0", e, bits), self._slopes("damage1", e, bits)
        slope = np.where((one[0] >= two[0])[:, None], one[1], two[1])
        # Where all units are alike, this is the price at which the budget is just spent.
        price = float(self.price["bytes"]) if self.adams["actor"].count else _PER_BIT * e.budget
        shares = bits @ e.weight / e.budget - 1  # (E,)
        over, spread = float(shares.mean()), max(float(shares.std()), _LEAST_SPREAD)
        step = self._cliff * np.exp(-0.5 * (over / spread) ** 2) / (np.sqrt(2 * np.pi) * spread)
        due = np.clip(price + _RESTORING * over, *self._limits) + step
        total = (slope + due * e.weight / e.budget) * span * shape[1]  # as of one unit among equals
        through = -total.reshape(-1) * (1 - a**2)
        alpha = float(np.exp(self.temperature["log"]))
        # d/d mean and d/d log_std of alpha * log pi - Q, through a = tanh(mean + std * noise)
        grad = np.stack([2 * alpha * a - through, alpha * (2 * a * scaled - 1) - through * scaled], 1)
        grad[:, 1] *= (layers[-1][:, 1] > _LOG_STD[0]) & (layers[-1][:, 1] < _LOG_STD[1])
        self.adams["actor"].step(self.nets["actor"].backward(layers, grad / n)[0])
        self.adams["temperature"].step({"log": -np.array((log_pi + _ENTROPY).mean())})
        self.price["bytes"] = np.array(np.clip(price + _INTEGRAL * over, *self._limits))

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that is learned and Adam's memory: `restore` goes on exactly here."""
        out: dict[str, np.ndarray] = {"price.bytes": self.price["bytes"].copy()}
        for name, adam in self.adams.items():
            out[f"{name}.count"] = np.array(adam.count)
            for k in adam.params:
                out |= {f"{name}.{k}": adam.params[k].copy(), f"{name}.{k}.first": adam.first[k].copy(),
                        f"{name}.{k}.second": adam.second[k].copy()}  # fmt: skip
        return out

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of `arrays`.

        Raises:
            KeyError, ValueError: arrays of another shape.
        """
        self.price["bytes"] = np.array(arrays["price.bytes"], float).reshape(())
        for name, adam in self.adams.items():
            adam.count = int(arrays[f"{name}.count"])
            for k in adam.params:
                for kind, place in (("", adam.params), (".first", adam.first), (".second", adam.second)):
                    place[k][...] = np.asarray(arrays[f"{name}.{k}{kind}"]).reshape(place[k].shape)
