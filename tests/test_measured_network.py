"""profiling/measured_network.py: what a network must give, and how far it may be off."""
import numpy as np
from graph_reference import float64_logits
from measured_network import Network


def test_a_quantised_network_is_near_the_float_one_and_rounds_where_it_quantises(
        small_model, tmp_path):
    float_logits = Network(str(small_model), tmp_path, float64_logits).logits
    quantised = Network(str(small_model), tmp_path, float64_logits, quantised=True)
    error = np.abs(quantised.logits - float_logits).max()
    assert 0 < error < 0.1 * np.abs(float_logits).max()
    # The image, what convolution, mean and Flatten give, and the logits are rounded to codes.
    assert quantised.terms == [27, 8, 0, 0, 0]
