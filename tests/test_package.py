"""The package as such: light to import, typed, and described truly."""

import importlib.metadata
import re

import ddpm_pipeline
from helpers import ROOT, run_python


def test_import_loads_nothing_heavy():
    loaded = run_python("import sys, ddpm_pipeline; print(*sorted(sys.modules))").split()
    assert "ddpm_pipeline" in loaded
    assert not {"torch", "diffusers", "numpy", "transformers", "huggingface_hub"} & set(loaded)


def test_every_public_name_can_be_imported():
    for name in ddpm_pipeline.__all__:
        assert getattr(ddpm_pipeline, name) is not None
    assert set(ddpm_pipeline.__all__) <= set(dir(ddpm_pipeline))


def test_version_is_one():
    assert importlib.metadata.version("ddpm-pipeline") == ddpm_pipeline.__version__
    assert f"## {ddpm_pipeline.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_type_hints_and_card_template_are_installed():
    assert (ROOT / "src/ddpm_pipeline/py.typed").is_file()
    assert (ROOT / "src/ddpm_pipeline/hub/model_card.md").read_text() == (ROOT / "model_card.md").read_text()


def test_links_and_code_names_in_the_docs_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
    equations = (ROOT / "docs/equations.md").read_text()
    for name in re.findall(r"`([a-z_]+)`(?=[ ,|]|$)", equations):
        if "_" in name and (
            name.startswith(("q_", "p_", "forward_")) or name.endswith(("_noise", "_target", "_sample"))
        ):
            assert hasattr(ddpm_pipeline.AlphaDDPMScheduler, name), name
