"""A step that is recorded once and replayed without Pyro.

``svi`` decides, step by step, whether to run, record or replay. A ``step`` is recorded by
``recording`` (and made shorter by ``simplify``), given the ``estimator_state``, and becomes a
``cuda_graph`` on a GPU. What a replay would get wrong is found by ``reads``, ``own_numbers``
and ``refusals`` when it is recorded, and by ``comparison`` later.
"""

from pyro_gumbel.infer.capture.svi import CapturedSVI

__all__ = ["CapturedSVI"]
