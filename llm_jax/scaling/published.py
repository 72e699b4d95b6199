"""Laws that papers published, as constants: lines to compare a fit with, and laws to plan by.

Either a loss L = E + A / N^alpha + B / D^beta (N parameters, D tokens), or where it has its optimum
at C FLOPs: N* = k_N C^a, D* = k_D C^b.
"""

from math import exp

# `optimal` of scaling/laws/frontier.py reads the first form; the second is its own answer.
LAWS: dict[str, dict[str, float]] = {
    # N without embeddings; C is the compute at small batches, in PF-days of 8.64e19 FLOPs. k_N, k_D
    # were fitted one by one: 6 N* D* is 1.8 C, not C.
    "kaplan": {"a": 0.73, "b": 0.27, "k_N": 1.3e9 / 8.64e19**0.73, "k_D": 2e10 / 8.64e19**0.27},
    # The paper prints exponents of two digits; these lines give the rows of its tables to the last
    # digit, all but that of 67B.
    "hoffmann1": {"a": 0.498109, "b": 0.501891, "k_N": 0.0992449, "k_D": 1 / (6 * 0.0992449)},
    "hoffmann2": {"a": 0.489882, "b": 0.510118, "k_N": 0.145892, "k_D": 1 / (6 * 0.145892)},
    "hoffmann3": {
        "A": exp(6.0073404), "B": exp(6.0179186), "E": exp(0.5267228),
        "alpha": 0.33917084, "beta": 0.2849083,
    },
    "besiroglu": {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658},
    # Without repetition; the decay of repeated tokens and of surplus parameters besides.
    "muennighoff": {
        "A": exp(6.255414), "B": exp(7.3049974), "E": exp(0.6254804),
        "alpha": 0.3526596, "beta": 0.3526596, "R_D_star": 15.387756, "R_N_star": 5.309743,
    },
    # Printed: D* = 0.29 C^0.53, which is 10.5T tokens at 3.8e25 FLOPs and not the 16.55T (for 402B
    # parameters) beside it. Here 0.29 is kept, and the exponent is what gives those.
    "llama3": {"a": 0.462216, "b": 0.537784, "k_N": 0.60373, "k_D": 0.29},
}  # fmt: skip

SOURCES = {
    "kaplan": "Kaplan et al. 2020 (arXiv 2001.08361), table 6",
    "hoffmann1": "Hoffmann et al. 2022 (arXiv 2203.15556), approach 1, from table 3",
    "hoffmann2": "Hoffmann et al. 2022 (arXiv 2203.15556), approach 2, from table A3",
    "hoffmann3": "Hoffmann et al. 2022 (arXiv 2203.15556), approach 3, unrounded",
    "besiroglu": "Besiroglu et al. 2024 (arXiv 2404.10102): approach 3 on Hoffmann's points again",
    "muennighoff": "Muennighoff et al. 2023 (arXiv 2305.16264), 182 runs on C4",
    "llama3": "Llama Team 2024 (arXiv 2407.21783), section 3.2.1",
}

# What each counts as N, a key of scaling/parameters.py's CONVENTIONS.
N_COUNTED = dict.fromkeys(LAWS, "all") | {"kaplan": "non_embedding"}
