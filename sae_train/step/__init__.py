"""One update of the weights: gradients, penalty, schedule, optimiser, state.

It imports `model` and `config`, and knows no loop.
"""
