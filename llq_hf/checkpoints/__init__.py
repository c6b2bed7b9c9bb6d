"""Folders of weights: dense ones that are read, packed ones that are written, and what identifies
them.
"""
