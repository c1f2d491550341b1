"""Evaluate a model: `python training/evaluate.py --model FOLDER_OR_REPO --dataset digits`.

The same as `python -m ddpm_pipeline.evaluation`, which needs no checkout.
"""

from ddpm_pipeline.evaluation.__main__ import main

if __name__ == "__main__":
    main()
