"""SAEs inside the language model: L0, FVU, delta loss and the other numbers measured over text.

One pass over the text serves all SAEs of a model. It imports `inference` and `checkpoint`, never
the trainer.
"""
