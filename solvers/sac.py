"""Soft actor-critic in NumPy, as small as a policy over a few features needs: two-layer networks, Adam, one action in (-1, 1).

Episodes give one reward at their end and nothing is discounted, so the critics learn the return itself rather than a
bootstrapped estimate of it; everything else is SAC (twin critics, squashed Gaussian, automatic temperature).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

__all__ = ["Adam", "Mlp", "Sac"]

_LOG_STD = (-5.0, 2.0)


class Mlp:
    """tanh layers, linear output; parameters in one dict, so that they can be saved."""

    def __init__(self, sizes: tuple[int, ...], rng: np.random.Generator) -> None:
        self.depth = len(sizes) - 1
        self.params: dict[str, np.ndarray] = {}
        for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
            self.params[f"w{i}"] = rng.normal(size=(fan_in, fan_out)) / np.sqrt(fan_in)
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


class Sac:
    """The learner.

    Args:
        features: length of a state; hidden: width of the two hidden layers.
        rng: of the first weights. lr: of all networks and the temperature.
    """

    def __init__(self, features: int, hidden: int, rng: np.random.Generator, lr: float = 3e-4) -> None:
        self.nets = {
            "actor": Mlp((features, hidden, hidden, 2), rng),
            "critic0": Mlp((features + 1, hidden, hidden, 1), rng),
            "critic1": Mlp((features + 1, hidden, hidden, 1), rng),
        }
        self.temperature = {"log": np.array(np.log(0.1))}
        self.adams = {name: Adam(net.params, lr) for name, net in self.nets.items()}
        self.adams["temperature"] = Adam(self.temperature, lr)

    def act(self, state: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        """(N,) actions in (-1, 1) of states (N, features); noise (N,) standard normal, None = the mean action."""
        mean, log_std, _ = self._policy(state)
        return np.tanh(mean if noise is None else mean + np.exp(log_std) * noise)

    def _policy(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        layers = self.nets["actor"].forward(state)
        return layers[-1][:, 0], np.clip(layers[-1][:, 1], *_LOG_STD), layers

    def update(
        self, state: np.ndarray, action: np.ndarray, target: np.ndarray, rng: np.random.Generator
    ) -> float:
        """One step of critics, actor and temperature on a batch; returns the critics' mean squared error.

        Args:
            state: (N, features). action: (N,). target: (N,) returns.
        """
        n, error = len(state), 0.0
        seen = np.concatenate([state, action[:, None]], 1)
        for name in ("critic0", "critic1"):
            layers = self.nets[name].forward(seen)
            off = layers[-1][:, 0] - target
            error += float((off**2).mean()) / 2
            self.adams[name].step(self.nets[name].backward(layers, 2 * off[:, None] / n)[0])
        mean, log_std, layers = self._policy(state)
        noise = rng.normal(size=n)
        scaled = np.exp(log_std) * noise
        a = np.tanh(mean + scaled)
        log_pi = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - np.log(np.maximum(1 - a**2, 1e-6))
        values, slopes = [], []
        asked = np.concatenate([state, a[:, None]], 1)
        for name in ("critic0", "critic1"):
            q = self.nets[name].forward(asked)
            values.append(q[-1][:, 0])
            slopes.append(self.nets[name].backward(q, np.ones((n, 1)))[1][:, -1])
        slope = np.where(values[0] <= values[1], slopes[0], slopes[1])
        alpha = float(np.exp(self.temperature["log"]))
        # d/d mean and d/d log_std of alpha * log pi - Q, through a = tanh(mean + std * noise)
        through = slope * (1 - a**2)
        grad = np.stack([2 * alpha * a - through, alpha * (2 * a * scaled - 1) - through * scaled], 1)
        inside = (layers[-1][:, 1] > _LOG_STD[0]) & (layers[-1][:, 1] < _LOG_STD[1])
        grad[:, 1] *= inside
        self.adams["actor"].step(self.nets["actor"].backward(layers, grad / n)[0])
        # Target entropy -dim(a) = -1.
        self.adams["temperature"].step({"log": -np.array((log_pi - 1.0).mean())})
        return error

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that is learned and Adam's memory: `restore` goes on exactly here."""
        out: dict[str, np.ndarray] = {}
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
        for name, adam in self.adams.items():
            adam.count = int(arrays[f"{name}.count"])
            for k in adam.params:
                for kind, place in (("", adam.params), (".first", adam.first), (".second", adam.second)):
                    place[k][...] = np.asarray(arrays[f"{name}.{k}{kind}"]).reshape(place[k].shape)
