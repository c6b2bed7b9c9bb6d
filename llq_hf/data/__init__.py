"""Token windows and image-text pairs: what methods are calibrated on, and what perplexity is
measured on.
"""
