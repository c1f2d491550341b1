"""Fit samplers of few steps to a model: `python training/fit_sampler.py --model FOLDER`.

The same as `python -m ddpm_pipeline.fitting`, which needs no checkout.
"""

from ddpm_pipeline.fitting.__main__ import main

if __name__ == "__main__":
    main()
