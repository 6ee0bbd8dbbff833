"""Programs under Pyro's handlers: scale, mask, condition, do, block, reparam, lift, and others."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer.reparam import LocScaleReparam, TransformReparam

from helpers.user_programs.program import bit, copies, normal, one_hot, param, program, table


@program(reference="enum")
def scaled(n):
    """A likelihood with a weight, and a weight for each element."""
    weights = table(0.5, 1.0, 2.5)

    def model():
        with copies(n, dim=-2):
            with poutine.scale(scale=0.4):
                a = bit("a", -0.4)
            with pyro.plate("item", 3, dim=-1), poutine.scale(scale=weights):
                z = bit("z", a - 0.5)
                normal("x", 2 * z + a, 0.9, obs=table(0.3, 1.9, 1.0).expand(n, 3))

    def guide():
        with copies(n, dim=-2):
            with poutine.scale(scale=0.4):
                a = bit("a", param("a", 0.3))
            with pyro.plate("item", 3, dim=-1), poutine.scale(scale=weights):
                bit("z", param("z", 0.2, -0.3, 0.6) + param("w", 0.4) * a)

    return model, guide


@program(reference="trace")
def normals_under_scales(n):
    """A weight for each element and a mask, in a minibatch of a plate."""
    data = table(0.4, -0.9, 1.7, 0.2)

    def terms(loc, scale, x=None):
        batch = pyro.plate("data", 4, subsample_size=2, dim=-1)
        with copies(n, dim=-2):
            w = normal("w", loc[0], scale)
            with batch as index, poutine.scale(scale=table(0.3, 1.6, 0.8, 1.2)[index]):
                z = normal("z", loc[1] + 0.5 * w, scale)
                if x is not None:
                    seen = poutine.mask(mask=table(True, True, False, True)[index])
                    with seen:
                        normal("x", z, 0.7, obs=x[index].expand(n, 2))

    def model():
        terms(table(0.0, 0.2), 1.0, data)

    def guide():
        terms(param("loc", 0.3, -0.2), param("scale", -0.4).exp())

    return model, guide


@program(reference="enum")
def masked_sites(n):
    """``.mask`` of distributions: of latent ones, of observed ones, by elements and whole."""
    keep = table(True, False, True)

    def model():
        with copies(n, dim=-2), pyro.plate("item", 3, dim=-1):
            z = pyro.sample("z", dist.OneHotCategorical(probs=table(0.2, 0.3, 0.5)).mask(keep))
            loc = (z * table(-1.0, 0.5, 2.0)).sum(-1)
            pyro.sample("x", dist.Normal(loc, 0.9).mask(keep), obs=torch.full((n, 3), 0.7))
            pyro.sample("y", dist.Normal(loc, 0.1).mask(False), obs=torch.full((n, 3), 9.0))

    def guide():
        with copies(n, dim=-2), pyro.plate("item", 3, dim=-1):
            logits = param("z", 0.4, 0.1, -0.2)
            pyro.sample("z", dist.OneHotCategorical(logits=logits).mask(keep))

    return model, guide


@program(reference="enum")
def conditioned_and_done(n):
    """Data given by ``condition``, an intervention by ``do``."""

    def joint():
        w = param("w", 0.7)
        with copies(n):
            t = bit("t", 0.3)
            z = bit("z", 0.5 * t - 0.2)
            normal("x", w * z + t, 0.8)
            bit("y", 2 * z - 1)

    def guide():
        with copies(n):
            bit("z", param("z", 0.4))

    done = poutine.block(poutine.do(joint, data={"t": torch.ones(n)}), hide=["t"])
    return poutine.condition(done, data={"x": torch.full((n,), 1.3), "y": torch.zeros(n)}), guide


@program(reference="enum")
def blocked_nuisance(n):
    """A latent that ``block`` hides from inference is noise of the model."""

    def joint():
        with copies(n):
            u = normal("u", 0.0, 0.5)
            z = one_hot("z", table(0.3, -0.2, 0.1))
            normal("x", (z * table(-1.0, 0.4, 1.5)).sum(-1) + u, 0.8, obs=torch.full((n,), 0.9))

    def guide():
        with copies(n):
            one_hot("z", param("z", 0.2, -0.4, 0.5))

    return poutine.block(joint, hide=["u"]), guide


@program(reference="enum")
def reparameterized(n):
    """Reparameterised in the model: the guide has the auxiliary sites."""

    def joint():
        with copies(n):
            b = bit("b", 0.2)
            m = normal("m", 0.5 * b, 0.8)
            positive = dist.TransformedDistribution(
                dist.Normal(m, 0.5), [dist.transforms.ExpTransform()]
            )
            s = pyro.sample("s", positive)
            normal("x", m, 0.5 + s, obs=torch.full((n,), 1.2))

    config = {"m": LocScaleReparam(0.0), "s": TransformReparam()}

    def guide():
        with copies(n):
            b = bit("b", param("b", 0.3))
            normal("m_decentered", param("m", 0.4) + 0.3 * b, 0.7)
            normal("s_base", param("s", -0.3), 0.6)

    return poutine.reparam(joint, config=config), guide


@program(reference="trace")
def lifted(n):
    """A parameter of the model becomes a latent under ``lift``."""

    def joint():
        w = pyro.param("w", torch.tensor(0.5))
        with copies(n):
            z = bit("z", 0.2)
            normal("x", w * (2 * z - 1), 1.0, obs=torch.full((n,), 0.8))

    def guide():
        normal("w", param("loc", 0.4), 0.3)
        with copies(n):
            bit("z", param("z", 0.3))

    return poutine.lift(joint, prior={"w": dist.Normal(0.0, 1.0)}), guide


@program(reference="enum")
def named_by_scope(n):
    @scope(prefix="block")
    def layer(z):
        return normal("h", z, 0.7)

    def model():
        with copies(n):
            z = bit("z", -0.3)
            h = layer(2 * z)
            normal("x", h, 1.0, obs=torch.full((n,), 1.5))

    def guide():
        with copies(n):
            z = bit("z", param("z", 0.2))
            layer(param("h", 0.5) + param("slope", 0.8) * z)

    return model, guide


@program(reference="enum", importance=False)
def choice_by_infer_config(n):
    """An estimator chosen by Pyro's ``infer_config``."""

    def model():
        with copies(n):
            z = one_hot("z", table(0.3, -0.2, 0.1))
            b = bit("b", (z * table(-1.0, 0.0, 1.0)).sum(-1))
            normal("x", b - (z * table(0.2, 0.8, -0.5)).sum(-1), 0.8, obs=torch.full((n,), 0.9))

    def guide():
        with copies(n):
            z = one_hot("z", param("z", 0.2, -0.4, 0.5))
            bit("b", param("b", 0.3) + (z * param("w", 0.5, 0.0, -0.5)).sum(-1))

    choose = {"z": "disarm_tree", "b": "disarm"}

    def config(site):
        return {"gradient": choose[site["name"]]} if site["name"] in choose else {}

    return model, poutine.infer_config(guide, config_fn=config)


@program(reference="enum")
def partly_observed(n):
    """``obs_mask``: elements that are missing become latent."""
    seen = table(True, False, True)
    data = table(0.4, 0.0, 1.6)

    def model():
        with copies(n, dim=-2), pyro.plate("item", 3, dim=-1):
            z = bit("z", -0.2)
            x = normal("x", 2 * z, 0.8, obs=data.expand(n, 3), obs_mask=seen.expand(n, 3))
            normal("y", x, 1.0, obs=torch.full((n, 3), 1.1))

    def guide():
        with copies(n, dim=-2), pyro.plate("item", 3, dim=-1):
            z = bit("z", param("z", 0.3))
            normal("x_unobserved", param("x", 0.5) + z, 0.7)

    return model, guide


@program(reference="trace")
def traced_within(n):
    """A program that runs another under a handler of its own and uses its values."""

    def helper():
        return normal("inner", 0.0, 0.3)

    def model():
        with poutine.block():
            shift = poutine.trace(helper).get_trace().nodes["inner"]["value"]
        with copies(n):
            z = bit("z", 0.1)
            normal("x", 2 * z + 0.1 * shift, 0.9, obs=torch.full((n,), 1.1))

    def guide():
        with copies(n):
            bit("z", param("z", -0.7))

    return model, guide
