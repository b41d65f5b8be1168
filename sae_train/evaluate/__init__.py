"""SAEs inside the language model: L0, FVU, delta loss and what else is measured over text.

One pass over the text serves all SAEs of a model.
"""
