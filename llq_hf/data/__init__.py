"""Calibration data (token windows, image-text pairs) and texts to measure perplexity on."""
