"""Sampling in bulk: any number of images, each a function of the seed and its number."""
