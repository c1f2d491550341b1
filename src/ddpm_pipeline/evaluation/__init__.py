"""Likelihoods and sample quality of a pipeline: bits per dimension, FID, KID, precision and recall."""
