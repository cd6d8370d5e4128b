"""Sphinx configuration. Build with ``make docs``; warnings are errors."""

from __future__ import annotations

from pathlib import Path

from pet_finetune import __version__
from pet_finetune.config.options_reference import options_reference

HERE = Path(__file__).parent

project = "pet-finetune"
author = "the pet-finetune developers"
copyright = f"2026, {author}"
release = version = __version__

extensions = ["myst_parser", "sphinx_copybutton", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# "$ " and ">>> " are prompts, not part of what is copied.
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True

root_doc = "index"
exclude_patterns = ["_build", "Thumbs.db", ".DS_Store"]
nitpicky = True
# Types of other libraries, and ours that the API page leaves out, are shown without a link.
nitpick_ignore_regex = [("py:.*", ".*")]

autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"pet-finetune {version}"
html_static_path = ["_static"]
html_css_files = ["terminal.css"]


def _write_options_reference() -> None:
    """Write options.md from the schema; an unchanged text leaves the file and its date alone."""
    page = HERE / "options.md"
    text = options_reference()
    if not page.is_file() or page.read_text(encoding="utf-8") != text:
        page.write_text(text, encoding="utf-8")


_write_options_reference()
