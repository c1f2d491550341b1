"""The long solution as coefficients, and the timesteps of short chains, by dynamic programming. NumPy in float64."""

from collections.abc import Iterable

import numpy as np

RIDGE = 1e-8  # relative; x_t and x̂_0 of near timesteps are nearly collinear


def solver_coefficients(log_snr: np.ndarray) -> np.ndarray:
    """DPM-Solver++ (2M) (Lu et al. 2022, algorithm 2) from noise to clean data: coefficients of x_t, x̂_0(t) and x̂_0(before t).

    `log_snr` is log(ᾱ_t/(1-ᾱ_t)) at the timesteps, noise first, [N]; the result is [N, 3]. It solves the probability-flow ODE
    to second order. The first step and the one into clean data, which gives x̂_0, are of first order, DDIM's.
    """
    half = log_snr / 2  # λ of the paper
    alpha, sigma = (np.exp(-np.logaddexp(0, -sign * log_snr) / 2) for sign in (1, -1))
    coefficients = np.zeros((len(half), 3))
    for i, step in enumerate(np.diff(half)):
        share = -alpha[i + 1] * np.expm1(-step)
        extrapolated = step / (half[i] - half[i - 1]) / 2 if i and np.isfinite(half[i - 1]) else 0.0
        coefficients[i] = sigma[i + 1] / sigma[i], share * (1 + extrapolated), -share * extrapolated
    coefficients[-1, 1] = 1
    return coefficients


def least_squares(products: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Coefficients [k, ...] from the inner products of k regressors [k, k], and theirs with the targets [k, ...]."""
    ridge = RIDGE * np.trace(products) / len(products)
    return np.linalg.solve(products + ridge * np.eye(len(products)), targets)


def step_errors(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared errors of single steps along the long solution, by places in its grid.

    `products` [2N + 1, 2N + 1] are inner products per pixel of its states x at the N timesteps, of clean data, and of its N
    predictions x̂_0. Returns errors [N + 1, N, N + 1]: of the best combination of x(b), x̂_0(b) and x̂_0(a) for x(c) with
    a < b < c, N for a being none and N for c clean data; and [N], of taking the noise for x(b).
    """
    total = len(products) // 2
    energy = np.diag(products)
    errors = np.full((total + 1, total, total + 1), np.inf)
    for b in range(total):
        after = np.arange(b + 1, total + 1)
        for a in (*range(b), total):
            used = [b, total + 1 + b, *([total + 1 + a] if a < total else [])]
            towards = products[np.ix_(used, after)]
            explained = (towards * least_squares(products[np.ix_(used, used)], towards)).sum(axis=0)
            errors[a, b, after] = np.maximum(energy[after] - explained, 0)
    start = energy[:total] + energy[0] - 2 * products[0, :total]
    return errors, start


def best_chains(errors: np.ndarray, start: np.ndarray, weights: np.ndarray, lengths: Iterable[int]) -> dict[int, list[int]]:
    """For each number of steps, the places in the grid with the least weighted sum of errors, all lengths in one pass.

    `weights` [N + 1] are of errors in x at each place. A chain may begin after the noise's place, with the noise as it is.
    """
    total = len(start)
    cost = errors * np.maximum(weights, np.finfo(float).tiny)  # without signal the weight is 0, and inf * 0 is NaN
    reached = cost[total] + (weights[:total] * start)[:, None]  # [b, c]: least cost of being at c, having come from b
    before: list[np.ndarray] = []  # [b, c]: where that came from
    chains, lengths = {}, set(lengths)
    for steps in range(1, max(lengths) + 1):
        if steps in lengths:
            place, following = int(reached[:, total].argmin()), total
            chain = [place]
            for came_from in reversed(before):
                place, following = int(came_from[place, following]), place
                chain.append(place)
            chains[steps] = chain[::-1]
        through = reached[:, :total, None] + cost[:total]  # [a, b, c]
        before.append(through.argmin(axis=0))
        reached = through.min(axis=0)
    return chains
