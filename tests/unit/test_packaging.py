"""The package's metadata agrees with itself."""

import re

from tests.support.debian import PROGRAMS
from tests.support.processes import ROOT


def test_requirements_name_the_same_when_read_from_either_file() -> None:
    """requirements.txt and pyproject.toml list the same packages with the same bounds."""
    # Python 3.10 has no tomllib yet; the list is one string a line.
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    assert re.findall(r'"(.*)"', block[1]) == (ROOT / "requirements.txt").read_text().split()


def test_makefile_installs_each_package_that_the_tests_look_for() -> None:
    """`make setup-debian` leaves no test without its programs."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    line = re.search(r"^DEBIAN_PACKAGES := (.*)$", makefile, re.MULTILINE)
    assert line is not None
    assert {*PROGRAMS, "python3-websocket"} <= set(line[1].split())
