"""What a config will cost: bytes, memory, FLOPs, hours, money.

Shapes come from the tables that training uses; nothing is run, and no room imports this one.
"""
