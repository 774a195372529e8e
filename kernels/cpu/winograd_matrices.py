"""The matrices of Winograd's minimal filtering F(m x m, 3x3), from Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks" (2016), arXiv:1509.09308, section 4.

An m x m tile of outputs Y comes from (m + 2) x (m + 2) inputs d and a 3x3 filter g by

    Y = A^T [(G g G^T) * (B^T d B)] A

where * multiplies element by element. Keys are m.
"""
from __future__ import annotations

from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]

INPUT: dict[int, Matrix] = {        # B^T, (m + 2) x (m + 2)
    2: ((1, 0, -1, 0),
        (0, 1, 1, 0),
        (0, -1, 1, 0),
        (0, -1, 0, 1)),
    4: ((4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1)),
}
WEIGHT: dict[int, Matrix] = {       # G, (m + 2) x 3
    2: ((1, 0, 0),
        (1 / 2, 1 / 2, 1 / 2),
        (1 / 2, -1 / 2, 1 / 2),
        (0, 0, 1)),
    4: ((1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1)),
}
OUTPUT: dict[int, Matrix] = {       # A^T, m x (m + 2)
    2: ((1, 1, 1, 0),
        (0, 1, -1, 1)),
    4: ((1, 1, 1, 1, 1, 0),
        (0, 1, -1, 2, -2, 0),
        (0, 1, 1, 4, 4, 0),
        (0, 1, -1, 8, -8, 1)),
}
