"""Arithmetic strings x, x+x, x*x-x, ...: a language whose probabilities are known exactly.

The grammar S -> x | S+S | S-S | S*S | S/S (Kusner and Hernandez-Lobato 2016, 1611.04051) stops
with probability ``STOP`` at each S and takes its operators at random. A string with k operators
has Catalan(k) trees. Strings are at most ``MAX_OPERATORS`` operators long: 1,365 in all.
"""

from __future__ import annotations

import itertools
import math

import torch

STOP = 0.55
MAX_OPERATORS = 5
OPERATORS = "+-*/"
ALPHABET = "x" + OPERATORS + "."  # the last one says that the string is over
END = len(ALPHABET) - 1
LENGTH = 2 * MAX_OPERATORS + 2


def all_strings() -> tuple[list[str], torch.Tensor]:
    """List every string of the language with its probability."""
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
    """One-hot tokens ``(N, LENGTH, len(ALPHABET))``, filled up with END."""
    indices = torch.tensor([[ALPHABET.index(c) for c in s.ljust(LENGTH, ".")] for s in strings])
    return torch.nn.functional.one_hot(indices, len(ALPHABET)).float()


def decode(tokens: torch.Tensor) -> list[str]:
    """The strings of one-hot tokens ``(N, LENGTH, len(ALPHABET))``."""
    return ["".join(ALPHABET[i] for i in row).rstrip(".") for row in tokens.argmax(-1).tolist()]
