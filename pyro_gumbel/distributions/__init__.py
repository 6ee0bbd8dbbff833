"""What is drawn: Gumbel and (relaxed) one-hot distributions."""

from pyro_gumbel.distributions.gumbel import gumbel_noise
from pyro_gumbel.distributions.one_hot import draw_one_hot, multilinear_log_prob
from pyro_gumbel.distributions.relaxed import straight_through

__all__ = ["draw_one_hot", "gumbel_noise", "multilinear_log_prob", "straight_through"]
