"""The documentation builds as a site, strictly and without a network."""

import os
import sys
from pathlib import Path

import pytest
from launch_helpers import run_program

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_the_site_builds_and_asks_no_other_host_for_anything(tmp_path):
    # A proxy that nobody listens at: whatever Sphinx or an extension wanted to load would fail.
    offline = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "https_proxy": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    run_program([sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", DOCS, tmp_path], env=offline)
    pages = {
        page.relative_to(tmp_path).as_posix(): page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")
    }
    for page in DOCS.rglob("*.md"):
        assert page.relative_to(DOCS).with_suffix(".html").as_posix() in pages
    for name, text in pages.items():
        for tag in ("<script src=", '<link rel="stylesheet"', "<img src=", "<img alt="):
            loads = [part.split(">")[0] for part in text.split(tag)[1:]]
            assert not [part for part in loads if "//" in part.split("?")[0]], name
    assert "ptx_coef" in pages["reference/settings.html"]
    assert "<math" in pages["reference/algorithm.html"]
