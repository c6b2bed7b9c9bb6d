"""Reads dense checkpoints, writes packed ones, and keeps what identifies and resumes a run."""
