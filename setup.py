"""Packaging of ddpm-pipeline; pyproject.toml names the build backend and holds the settings of the tools."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "src/ddpm_pipeline/__init__.py").read_text("utf-8")).group(1)


# Where the release workflow runs, which is the one place that knows it
REPOSITORY = os.environ.get("GITHUB_REPOSITORY") and "https://github.com/" + os.environ["GITHUB_REPOSITORY"]
URLS = {"Source": REPOSITORY, "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md"} if REPOSITORY else {}


def long_description() -> str:
    """The README with links and pictures that lead to the repository, or without them where it is not known."""
    text = (HERE / "README.md").read_text("utf-8")
    if REPOSITORY:
        text = re.sub(r"!\[([^]]*)\]\((?!http)([^)]*)\)", rf"![\1]({REPOSITORY}/raw/main/\2)", text)
        return re.sub(r"(?<!!)\[([^]]*)\]\((?!http)([^)]*)\)", rf"[\1]({REPOSITORY}/blob/main/\2)", text)
    return re.sub(r"\[([^]]*)\]\((?!http)[^)]*\)", r"\1", re.sub(r"!\[[^]]*\]\((?!http)[^)]*\)\n?", "", text))


# The lower bounds were tried together, with torch 2.13 on Python 3.11; older torch was not.
TRAIN = [
    "accelerate>=1.5",
    "datasets>=4.7",
    "scikit-learn>=1.3",
    "pyyaml>=6.0",
    "tqdm>=4.66",
    "psutil>=5.9",
    "torchmetrics>=1.6",
]
EVAL = [*TRAIN, "matplotlib>=3.8"]  # which benchmarks/few_steps.py plots with
# Whoever asks for one of these wants to train or evaluate with it
INCEPTION = [*EVAL, "torchmetrics[image]>=1.6"]  # torchvision and torch-fidelity, for published FIDs
TIFF = [*TRAIN, "tifffile>=2024.8", "imagecodecs>=2024.6"]  # several bands, and colours beyond 8 bits; LZW and the like
TENSORBOARD = [*TRAIN, "tensorboard>=2.16"]
WANDB = [*TRAIN, "wandb>=0.20"]
APP = ["gradio>=6.0", "matplotlib>=3.8"]  # a demo in the browser
CATS = [*TRAIN, "robohash==2.0"]  # its art: another version may have other pictures
NOTEBOOK = [*EVAL, "nbclient>=0.10", "nbformat>=5.7", "ipykernel>=6.29", "ipywidgets>=8.1"]  # docs/notebooks
DOCS = [  # sphinx-build -W docs build/site
    *EVAL,
    "sphinx>=9.0",
    "myst-nb>=1.4",
    "furo>=2025.12",
    "sphinx-copybutton>=0.5.2",
    "sphinx-mathjax-offline>=0.0.2",
]
TEST = [
    *NOTEBOOK,
    *TENSORBOARD,
    *CATS,
    *TIFF,
    "pytest>=8.0",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "markdown-it-py>=3.0",
    "mpmath>=1.3",
    "scipy>=1.11",
    "torchsde>=0.2.6",
    "ruff>=0.6",
    "import-linter>=2.17",
]

setup(
    name="ddpm-pipeline",
    version=VERSION,
    description="DDPM for diffusers: exact forward and posterior maths, pipelines, training and likelihoods",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="The ddpm-pipeline authors",
    keywords=["diffusion models", "DDPM", "diffusers", "image generation", "likelihood"],
    project_urls={**URLS, "Paper": "https://arxiv.org/abs/2006.11239", "diffusers": "https://huggingface.co/docs/diffusers"},
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"ddpm_pipeline": ["py.typed", "hub/model_card.md", "recipes/*.yaml"]},
    install_requires=[
        "diffusers>=0.42",
        "transformers>=5.0",
        "torch>=2.5",
        "huggingface-hub>=1.32",
        "jinja2>=3.1",
        "safetensors>=0.4",
        "numpy>=1.26",
        "pillow>=10.1",
    ],
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "inception": INCEPTION,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        "app": APP,
        "cats": CATS,
        "tiff": TIFF,
        "notebook": NOTEBOOK,
        "docs": DOCS,
        "test": TEST,
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
)
