"""A program that fails inside a test says why."""

import pytest
from launch_helpers import python


def test_what_a_program_says_on_its_way_to_an_error_is_in_the_failure():
    with pytest.raises(AssertionError, match=r"exit 3 of [\s\S]*to stdout[\s\S]*to stderr"):
        python("-c", "import sys; print('to stdout'); print('to stderr', file=sys.stderr); sys.exit(3)")
    assert python("-c", "print('all is well')") == "all is well\n"


def test_a_program_that_hangs_is_ended_and_says_what_it_said():
    with pytest.raises(AssertionError, match="before it hung"):
        python("-c", "import time; print('before it hung', flush=True); time.sleep(60)", timeout=2)
