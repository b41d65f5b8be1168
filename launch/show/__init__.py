"""Tables for people: the status of runs, plans, stores and SAEs, and what an upload sends.

It imports every other room of this package; only `launch.commands` imports it.
"""
