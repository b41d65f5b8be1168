"""Rows from anywhere into a store: files of other programs, or what an iterator gives.

The room reads other people's arrays and checks them row by row. It imports the rooms before it and
runs no language model.
"""
