"""Sample many images: `python training/generate.py --model FOLDER_OR_REPO --num_images 50000 --seed 0`.

The same as `python -m ddpm_pipeline.generation`, which needs no checkout.
"""

from ddpm_pipeline.generation.__main__ import main

if __name__ == "__main__":
    main()
