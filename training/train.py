"""Train a diffusion model: `python training/train.py` runs the digits recipe, `--help` lists the options.

The same as `python -m ddpm_pipeline.training`, which needs no checkout.
"""

from ddpm_pipeline.training.__main__ import main

if __name__ == "__main__":
    main()
