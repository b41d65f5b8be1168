"""Training through the language model: which text a step reads, the frozen model, and the loss.

It knows no training state; `sae_train.train` has the loop and the step.
"""
