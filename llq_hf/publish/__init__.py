"""Writes model cards and uploads packed checkpoints to the Hub."""
