"""A language of arithmetic strings, such as x, x+x and x*x-x, with known probabilities.

The grammar S -> x | S+S | S-S | S*S | S/S (Kusner and Hernandez-Lobato 2016, 1611.04051) stops
with probability ``STOP`` at each S and chooses operators uniformly. A string with k operators has
Catalan(k) trees. Strings have at most ``MAX_OPERATORS`` operators; there are 1,365 of them.
"""

from __future__ import annotations

import itertools
import math

import torch

STOP = 0.55
MAX_OPERATORS = 5
OPERATORS = "+-*/"
ALPHABET = "x" + OPERATORS + "."  # the last symbol ends a string
END = len(ALPHABET) - 1
LENGTH = 2 * MAX_OPERATORS + 2


def all_strings() -> tuple[list[str], torch.Tensor]:
    """Return every string of the language and their probabilities."""
    strings, weights = [], []
    for k in range(MAX_OPERATORS + 1):
        catalan = math.comb(2 * k, k) / (k + 1)
        weight = catalan * STOP ** (k + 1) * (1 - STOP) ** k / len(OPERATORS) ** k
        for chosen in itertools.product(OPERATORS, repeat=k):
            strings.append("x" + "".join(op + "x" for op in chosen))
            weights.append(weight)
    probs = torch.tensor(weights, dtype=torch.float64)
    return strings, (probs / probs.sum()).float()


def encode(strings: list[str]) -> torch.Tensor:
    """Encode strings as one-hot tokens ``(N, LENGTH, len(ALPHABET))``, padded with END."""
    indices = torch.tensor([[ALPHABET.index(c) for c in s.ljust(LENGTH, ".")] for s in strings])
    return torch.nn.functional.one_hot(indices, len(ALPHABET)).float()


def decode(tokens: torch.Tensor) -> list[str]:
    """Decode one-hot tokens ``(N, LENGTH, len(ALPHABET))`` to strings."""
    return ["".join(ALPHABET[i] for i in row).rstrip(".") for row in tokens.argmax(-1).tolist()]
