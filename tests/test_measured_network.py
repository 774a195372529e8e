"""profiling/measured_network.py: what a network must give, and how far it may be off."""
import numpy as np
import pytest
from graph_reference import float64_logits
from measured_network import EVERYTHING, PRODUCTS, Network


@pytest.mark.parametrize(("how", "terms"), [
    (PRODUCTS, [27, 8]),                # the image and what the last layer reads
    (EVERYTHING, [27, 8, 0, 0, 0])])    # what convolution, mean and Flatten give, and the logits
def test_a_quantised_network_is_near_the_float_one_and_rounds_where_it_quantises(
        small_model, tmp_path, how, terms):
    float_logits = Network(str(small_model), tmp_path, float64_logits).logits
    quantised = Network(str(small_model), tmp_path, float64_logits, quantised=how)
    error = np.abs(quantised.logits - float_logits).max()
    assert 0 < error < 0.1 * np.abs(float_logits).max()
    assert quantised.terms == terms
