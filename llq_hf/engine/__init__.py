"""The run: a model goes through block by block, a method quantizes it, packed blocks come out."""
