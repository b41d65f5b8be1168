"""Settings that fit the budget: formulas, and a config filled with them.

It knows plain values alone; `config` asks it before it checks them.
"""
