"""Public names exist, with the parameters that users write."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from pyro.distributions import TorchDistribution
from pyro.infer import ELBO, SVI
from torch import nn

from pyro_gumbel import diagnostics, distributions, estimators, guides, infer

# The parameters that may be given by position, then those by keyword alone.
SIGNATURES: dict[Any, dict[str, tuple[str, str]]] = {
    distributions: {
        "Gumbel": ("loc scale", ""),
        "TruncatedGumbel": ("loc upper scale", ""),
        "OneHot": ("probs logits", ""),
        "RelaxedOneHot": ("temperature probs logits", "straight_through"),
        "ExpRelaxedOneHot": ("temperature probs logits", ""),
        "RelaxedBernoulli": ("temperature probs logits", "straight_through"),
    },
    estimators: {
        "Estimator": ("", ""),
        "Pathwise": ("", "sticking_the_landing"),
        "Score": ("baseline", ""),
        "StraightThrough": ("temperature", ""),
        "GumbelSoftmax": ("temperature", ""),
        "GumbelStraightThrough": ("temperature", "backward_temperature"),
        "GappedStraightThrough": ("temperature", "gap"),
        "GumbelRao": ("temperature", "num_samples"),
        "ReinMax": ("temperature", ""),
        "ReinMaxRao": ("temperature", "num_samples"),
        "DisARM": ("", ""),
        "ARMS": ("num_samples", ""),
        "DisARMTree": ("", ""),
        "DoubleControlVariate": ("num_samples", ""),
        "Rodeo": ("num_samples", ""),
        "MuProp": ("", ""),
        "Rebar": ("temperature", "learn"),
        "Relax": ("critic", "temperature"),
        "LocalExpectation": ("", ""),
        "SumAndSample": ("num_sum", ""),
        "UnorderedSet": ("num_samples", ""),
        "Enumerate": ("", ""),
        "LeaveOneOut": ("", ""),
        "MovingAverage": ("decay", ""),
        "NeuralBaseline": ("module input", ""),
        "Exponential": ("start end rate", ""),
        "Linear": ("start end steps", ""),
    },
    infer: {
        "config_gradient": ("guide config", ""),
        "Estimator_ELBO": (
            "num_particles",
            "default vectorize_particles max_plate_nesting analytic_kl",
        ),
        "ImportanceWeighted_ELBO": ("num_particles", "doubly_reparameterized"),
        "RelaxReparam": ("temperature", "straight_through"),
        "CapturedSVI": ("model guide optim loss", ""),
        "DistributedSVI": ("model guide optim loss", "plate"),
        "save_checkpoint": ("path svi", ""),
        "load_checkpoint": ("path svi", ""),
    },
    guides: {
        "AutoDiscrete": ("model", "gradient"),
        "AutoAmortized": ("model encoder", "gradient plate"),
    },
    diagnostics: {
        "exact_gradient": ("model guide", "params max_states"),
        "gradient_draws": (
            "model guide",
            "estimators num_draws num_chains num_particles params project seed progress",
        ),
        "compare_gradients": ("draws reference", ""),
        "plot_gradients": ("draws reference", ""),
        "plot_training": ("histories", ""),
        "train": ("model guide", "estimators optim num_steps seeds"),
        "to_arviz": ("draws reference", "posterior"),
        "guide_khat": ("model guide", "num_samples"),
        "check_unbiased": ("model guide", "estimator num_draws"),
        "recommend": ("model guide", "budget_seconds budget_evaluations"),
    },
}
CASES = [(module, name) for module, names in SIGNATURES.items() for name in names]


def kinds_of_parameters(thing: Any) -> dict[str, Any]:
    """The parameters by name, including those that ``**kwargs`` passes to a parent class."""
    parameters = inspect.signature(thing).parameters
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    if inspect.isclass(thing) and inspect.Parameter.VAR_KEYWORD in kinds.values():
        inherited = kinds_of_parameters(thing.__mro__[1])
        kinds |= {name: kind for name, kind in inherited.items() if name not in kinds}
    return kinds


@pytest.mark.parametrize(("module", "name"), CASES, ids=[name for _, name in CASES])
def test_parameters(module: Any, name: str) -> None:
    by_position, by_keyword = (words.split() for words in SIGNATURES[module][name])
    assert name in module.__all__
    kinds = kinds_of_parameters(getattr(module, name))
    positional = [
        n for n, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert positional[: len(by_position)] == by_position
    for parameter in by_keyword:
        assert kinds[parameter] in (
            inspect.Parameter.KEYWORD_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        )


def test_kinds() -> None:
    for name in SIGNATURES[distributions]:
        assert issubclass(getattr(distributions, name), TorchDistribution)
    for name in estimators.__all__:
        if issubclass(getattr(estimators, name), (estimators.Estimator, estimators.Baseline)):
            assert issubclass(getattr(estimators, name), nn.Module)
    assert issubclass(infer.Estimator_ELBO, ELBO)
    assert issubclass(infer.ImportanceWeighted_ELBO, ELBO)
    assert issubclass(infer.CapturedSVI, SVI)
    assert issubclass(infer.DistributedSVI, SVI)


def test_names_of_estimators() -> None:
    classes = set(SIGNATURES[estimators])
    others = {"Estimator", "Relax", "LeaveOneOut", "MovingAverage", "NeuralBaseline"}
    snake_case = {
        "ARMS": "arms",
        "DisARM": "disarm",
        "DisARMTree": "disarm_tree",
        "DoubleControlVariate": "double_control_variate",
        "Enumerate": "enumerate",
        "GappedStraightThrough": "gapped_straight_through",
        "GumbelRao": "gumbel_rao",
        "GumbelSoftmax": "gumbel_softmax",
        "GumbelStraightThrough": "gumbel_straight_through",
        "LocalExpectation": "local_expectation",
        "MuProp": "muprop",
        "Pathwise": "pathwise",
        "Rebar": "rebar",
        "ReinMax": "reinmax",
        "ReinMaxRao": "reinmax_rao",
        "Rodeo": "rodeo",
        "Score": "score",
        "StraightThrough": "straight_through",
        "SumAndSample": "sum_and_sample",
        "UnorderedSet": "unordered_set",
    }
    assert set(snake_case) == classes - others - {"Exponential", "Linear"}
    assert {"auto", *snake_case.values()} == set(infer.estimator_names())
