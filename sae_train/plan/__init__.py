"""What a config will cost: bytes, memory, FLOPs, hours, money.

Shapes come from the tables the training code uses; nothing is run.
"""
