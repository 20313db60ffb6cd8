"""Trains and compares variants of the method on the shapes benchmark: `self1e ablate`."""
