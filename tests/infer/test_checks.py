"""Errors about models, guides and estimators that do not match name the site and a remedy."""

from __future__ import annotations

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.faulty import (
    BIT,
    HALF,
    INDEX,
    LOGITS,
    NORMAL,
    ONE_HOT,
    PLATED_ONE_HOT,
    PYRO_HARD,
    PYRO_HARD_BIT,
    PYRO_SOFT,
    PYRO_SOFT_BIT,
    RELAXED,
    P,
    empty,
    enumerated_inside_observed_outside,
    misnamed,
    observed,
    plated,
    site,
    step,
    with_gradient,
)

from pyro_gumbel.estimators import (
    Enumerate,
    GappedStraightThrough,
    LeaveOneOut,
    Pathwise,
    ReinMax,
    Score,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

ROWS = {
    # Estimator against site
    "reinmax on an index": (
        with_gradient(INDEX, ReinMax()),
        ValueError,
        r"At site 'z', ReinMax\(1.0\) does not support a Categorical site: it needs one-hot or "
        r"Bernoulli. Supported estimators: .*enumerate, .*score",
    ),
    "reinmax on a normal": (
        with_gradient(NORMAL, ReinMax()),
        ValueError,
        r"does not support a Normal site.*Supported estimators: pathwise, score. Choose site by "
        r"site: config_gradient\(guide, \{'z': 'pathwise', ...\}\)",
    ),
    "reinmax on a relaxed one-hot": (
        step(ONE_HOT, config_gradient(RELAXED, ReinMax())),
        ValueError,
        r"At site 'z', ReinMax\(1.0\) does not support a RelaxedOneHot site: .*If the model's "
        r"site is discrete, write OneHotCategorical\(logits=...\) in the guide, too; .*Supported "
        r"estimators of a relaxed site: pathwise, score",
    ),
    "reinmax on a relaxed bit": (
        step(BIT, config_gradient(PYRO_SOFT_BIT, ReinMax())),
        ValueError,
        r"does not support a RelaxedBernoulli site.*write Bernoulli\(logits=...\) in the guide",
    ),
    "pathwise on a bit": (
        with_gradient(BIT, Pathwise()),
        ValueError,
        r"does not support a Bernoulli site: it needs a reparameterised site \(has rsample\). "
        r"Supported estimators: .*reinmax, .*score",
    ),
    "gapped on a bit": (
        with_gradient(BIT, GappedStraightThrough()),
        ValueError,
        r"GappedStraightThrough\(0.5, gap=1.0\) does not support a Bernoulli site: it needs one-",
    ),
    "enumerate counts": (
        with_gradient(site(lambda: dist.Poisson(1.0)), Enumerate()),
        ValueError,
        r"Enumerate\(\) does not support a Poisson site: it needs any site with "
        r"enumerate_support. Supported estimators: score",
    ),
    "enumerate an event": (
        with_gradient(site(lambda: dist.Bernoulli(P).to_event(1)), Enumerate()),
        ValueError,
        r"At site 'z'.*Enumerate\(\).*to_event.*is a product.*pyro.plate",
    ),
    "enumerated inside, used outside": (
        with_gradient(enumerated_inside_observed_outside, {"z": Enumerate()}),
        ValueError,
        r"Site 'x', outside the plate 'rows', depends on the enumerated site 'z' inside it.*"
        r"Use another estimator at 'z', such as Score\(\) or ReinMax\(\)",
    ),
    "leave-one-out alone": (
        with_gradient(BIT, Score(LeaveOneOut())),
        ValueError,
        r"At site 'z', Score\(LeaveOneOut\(\)\) needs num_particles >= 2; got 1. Write "
        r"Estimator_ELBO\(num_particles=2\), or use Score\(MovingAverage\(\)\)",
    ),
    # Model against guide
    "missing from the guide": (
        step(BIT, empty),
        ValueError,
        r"latent site 'z' is missing from the guide, whose sites are \[\]. Sample it in the guide",
    ),
    "misnamed in the guide": (
        step(BIT, misnamed),
        ValueError,
        r"'z' is missing from the guide, whose sites are \['latent_z'\]",
    ),
    "observed in the model": (
        step(observed, BIT),
        ValueError,
        r"Site 'z' is observed in the model and sampled in the guide; remove it from the guide",
    ),
    "an index and a vector": (
        step(ONE_HOT, INDEX),
        ValueError,
        r"At site 'z', model and guide disagree on event_dim: the model's OneHotCategorical has "
        r"event shape \(3,\), the guide's Categorical has \(\).*\.to_event",
    ),
    "to_event on one side": (
        step(
            site(lambda: dist.Bernoulli(P).to_event(1)), plated(lambda: dist.Bernoulli(P), size=3)
        ),
        ValueError,
        r"At site 'z', model and guide disagree on event_dim.*the same \.to_event",
    ),
    "numbers of categories": (
        step(ONE_HOT, site(lambda: dist.OneHotCategorical(torch.ones(4)))),
        ValueError,
        r"At site 'z', model and guide disagree on the event shape: OneHotCategorical has \(3,\) "
        r"in the model, OneHotCategorical has \(4,\) in the guide",
    ),
    "a density facing a mass": (
        step(ONE_HOT, RELAXED),
        ValueError,
        r"At site 'z', the guide's RelaxedOneHot has a density and the model's OneHotCategorical "
        r"has a mass: their ratio is not an ELBO.*OneHotCategorical\(...\).*"
        r"config_gradient\(guide, \{'z': ReinMax\(\)\}\)",
    ),
    "a mass facing a density": (
        step(RELAXED, ONE_HOT),
        ValueError,
        r"the guide's OneHotCategorical has a mass and the model's RelaxedOneHot has a density",
    ),
    "a plate in the model alone": (
        step(plated(lambda: dist.Normal(0.0, 1.0), size=6), NORMAL),
        ValueError,
        r"At site 'z', model and guide disagree on the batch shape: the model's Normal has \(6,\) "
        r"in plate 'rows' of 6, the guide's Normal has \(\) in no plate. Write the same `with",
    ),
    "a plate in the guide alone": (
        step(ONE_HOT, PLATED_ONE_HOT),
        ValueError,
        r"the model's OneHotCategorical has \(\) in no plate, .* has \(2,\) in plate 'rows' of 2",
    ),
    "bits for a one-hot": (
        step(ONE_HOT, site(lambda: dist.Bernoulli(P).to_event(1))),
        ValueError,
        r"At site 'z', the guide's Bernoulli draws values that have no mass under the model's "
        r"OneHotCategorical: their ratio is not an ELBO. Write OneHotCategorical in the guide",
    ),
    "counts for a bit": (
        step(BIT, site(lambda: dist.Poisson(1.0))),
        ValueError,
        r"the guide's Poisson draws values that have no mass under the model's Bernoulli",
    ),
    "Pyro's relaxed facing a mass": (
        step(ONE_HOT, PYRO_SOFT),
        ValueError,
        r"the guide's RelaxedOneHotCategorical has a density.*OneHotCategorical has a mass",
    ),
    "Pyro's straight-through in the guide": (
        step(ONE_HOT, PYRO_HARD),
        ValueError,
        r"At site 'z', the guide's RelaxedOneHotCategoricalStraightThrough draws hard values and "
        r"scores them by the density of soft ones.*Write OneHotCategorical\(logits=...\) in the "
        r"model and in the guide, and config_gradient\(guide, \{'z': GumbelStraightThrough",
    ),
    "Pyro's straight-through in the model": (
        step(PYRO_HARD, ONE_HOT),
        ValueError,
        r"the model's RelaxedOneHotCategoricalStraightThrough draws hard values",
    ),
    "Pyro's straight-through in both": (
        step(PYRO_HARD, PYRO_HARD),
        ValueError,
        r"StraightThrough draws hard values",
    ),
    "Pyro's straight-through bit": (
        step(BIT, PYRO_HARD_BIT),
        ValueError,
        r"the guide's RelaxedBernoulliStraightThrough draws.*Write Bernoulli\(logits=...\)",
    ),
    # NaN
    "nan logits": (
        step(ONE_HOT, site(lambda: dist.OneHotCategorical(logits=LOGITS * math.nan))),
        ValueError,
        r"parameter logits .*nan",
    ),
    # Pyro's hooks that are not ours
    "a trace": (
        lambda: Estimator_ELBO()._get_trace(None, None, (), {}),
        NotImplementedError,
        r"call loss or loss_and_grads",
    ),
}


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize(
    ("latent", "guide", "pattern"),
    [
        (ONE_HOT, site(lambda: dist.OneHotCategorical(torch.ones(4))), "disagree on the event sh"),
        (ONE_HOT, INDEX, "disagree on event_dim"),
        (
            INDEX,
            site(lambda: dist.Categorical(logits=torch.eye(4)[3] * 9)),
            "drew 3, and .* has the values 0 to 2",
        ),
        (INDEX, BIT, "Bernoulli draws values of torch.float32, and the model's Categorical has"),
    ],
)
def test_a_value_that_breaks_the_model_is_named_first(latent, guide, pattern, vectorize):
    def model():
        z = latent()
        mean = z @ P if z.dtype == P.dtype else P[z]
        pyro.sample("x", dist.Normal(mean, 1.0), obs=HALF)

    elbo = Estimator_ELBO(3, vectorize_particles=vectorize)
    with pytest.raises(ValueError, match=pattern):
        elbo.loss_and_grads(model, guide)


def test_one_family_may_stand_for_another_that_has_its_values():
    step(BIT, site(lambda: dist.Categorical(torch.ones(2))))()
    step(INDEX, site(lambda: dist.Categorical(torch.ones(2))))()
    step(site(lambda: dist.Bernoulli(P).to_event(1)), ONE_HOT)()


@pytest.mark.parametrize("row", ROWS)
def test_message(row):
    run, kind, pattern = ROWS[row]
    with pytest.raises(kind, match="(?s)" + pattern):
        run()


def test_an_unmarked_auxiliary_site_is_warned_of():
    def guide():
        BIT()
        pyro.sample("u", dist.Bernoulli(0.5))

    with pytest.warns(UserWarning, match=r"Site 'u' is in the guide and not in the model; .*aux"):
        Estimator_ELBO().loss(BIT, guide)


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_failing_step_leaves_no_handler_behind(vectorize):
    """After any of these errors the next step works."""
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize)
    for _ in range(2):
        with pytest.raises(ValueError, match="is missing from the guide"):
            elbo.loss_and_grads(BIT, empty)
        assert abs(float(elbo.loss_and_grads(BIT, BIT))) < 1e-6
        assert not pyro.poutine.runtime.am_i_wrapped()


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("estimator", ["score", "reinmax"])
def test_a_product_that_does_not_broadcast_over_particles(estimator: str, validate: bool) -> None:
    def model() -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        with pyro.plate("n", 6):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=torch.zeros(6, 2))

    def guide() -> None:
        pyro.sample("weight", dist.Normal(pyro.param("w", torch.zeros(3, 2)), 1.0).to_event(2))
        with pyro.plate("n", 6):
            pyro.sample("z", dist.OneHotCategorical(torch.ones(3)), infer={"gradient": estimator})

    elbo = Estimator_ELBO(2, vectorize_particles=True, max_plate_nesting=1)
    with (
        pyro.validation_enabled(validate),
        pytest.raises(ValueError, match=r"Site 'x'.*\(2, 2, 6\).*last 2 dimensions.*unsqueeze"),
    ):
        elbo.loss_and_grads(model, guide)


@pytest.mark.parametrize("validate", [True, False])
def test_a_score_that_no_estimator_can_serve(validate: bool) -> None:
    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide() -> None:
        logits = pyro.param("l", torch.tensor(0.3))
        z = torch.bernoulli(logits.sigmoid().detach())
        score = dist.Bernoulli(logits=logits).log_prob(z)
        pyro.factor("own", score, has_rsample=False)
        pyro.sample("z", dist.Delta(z))

    with (
        pyro.validation_enabled(validate),
        pytest.raises(ValueError, match=r"'own' of the guide is a factor with has_rsample=False"),
    ):
        Estimator_ELBO().loss_and_grads(model, guide)


def indexed_by_a_latent(loc: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Categorical(torch.ones(3)))
    pyro.sample("x", dist.Normal(loc[z], 1.0), obs=torch.zeros(6))


@pytest.mark.parametrize(
    ("estimator", "left"),
    [
        ("score", r"4 particles or coupled draws at -2 of"),
        ("disarm_tree", r"8 particles or coupled draws at -2 of"),
        ("enumerate", r"4 particles or coupled draws at -2 and every value of 'z' at -3 of"),
    ],
)
def test_an_index_that_does_not_broadcast_is_explained(estimator: str, left: str) -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("n", 6):
            indexed_by_a_latent(loc)

    def guide() -> None:
        pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("n", 6):
            pyro.sample("z", dist.Categorical(torch.ones(3)), infer={"gradient": estimator})

    elbo = Estimator_ELBO(4, vectorize_particles=True)
    with pytest.raises(ValueError, match="Shape mismatch") as caught:
        elbo.loss_and_grads(model, guide)
    (note,) = caught.value.__notes__
    assert re.search(left, note)
    assert "Vindex(loc)[..., z]" in note
    assert "more than 1 plates need a larger max_plate_nesting" in note


def test_only_what_has_dimensions_on_the_left_is_explained() -> None:
    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        with pyro.plate("n", 5):
            pyro.sample("x", dist.Normal(torch.zeros(6), 1.0), obs=torch.zeros(6))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(0.4))

    with pytest.raises(ValueError, match="Shape mismatch") as caught:
        Estimator_ELBO().loss_and_grads(model, guide)
    assert not hasattr(caught.value, "__notes__")
